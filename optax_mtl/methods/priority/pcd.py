"""Priority-constrained descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers, tasks


class PCDState(NamedTuple):
    """State of :func:`pcd`."""

    counts: jax.Array  # Gradients seen from each task, shape `(num_tasks,)`.
    squared_norms: jax.Array  # Moving averages, unbiased, shape `(num_tasks,)`.


@names.by_name("tau", of_tasks=["primary"])
def pcd(
    num_tasks: int,
    *,
    tau: names.PerTask = 0.02,
    primary: names.Task = 0,
    decay: jax.typing.ArrayLike = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Priority-constrained descent (PCD).

    Stays as close to the primary gradient as progress in all other tasks permits:

    .. math::

      \tilde{d} = \arg\min_d \; \|d - \tilde{g}_p\|^2
      \quad \text{subject to} \quad
      \langle \tilde{g}_i, d \rangle \ge \tau \|\tilde{g}_i\|^2, \; i \ne p,
      \qquad d = \frac{\|g_p\|}{\|\tilde{d}\|} \, \tilde{d},

    where :math:`\tilde{g}_i` is :math:`g_i` divided by the root of the moving average
    of its squared norm, with bias correction. The update has the norm of the primary
    gradient. It is the primary gradient where no direction meets the constraints,
    such as for two opposite secondary gradients, and zero where that is zero.

    Args:
      num_tasks: number of tasks, T.
      tau: progress of a secondary task, as a fraction in [0, 1] of what its own
        normalised gradient would bring it; one for all tasks or one for each, shape
        ``(T,)`` or a dict by name, where that of the primary task is not used.
      primary: number or name of the primary task, :math:`p`.
      decay: of the moving average of the squared norms. In [0, 1).

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: if ``tau`` is not in [0, 1], or for a task that does not exist.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1, 1], [6, 1, 1]])
      >>> method = optax_mtl.pcd(num_tasks=2)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [-0.82   2.943  2.943]

    References:
      Varam and AlHajri, `Not All Objectives Are Born Equal: Priority-Constrained
      Descent for Hierarchical Multi-Objective Optimization
      <https://arxiv.org/abs/2606.29521>`_, TMLR 2026

    .. note::
      Other implementations add 1e-8 to the averages, which changes the direction for
      gradients of about that size.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("tau", tau, "[0, 1]")
    main = arguments.check_primary(primary, num_tasks)
    arguments.check_range("decay", decay, "[0, 1)")

    def init_fn():
        return PCDState(
            counts=jnp.zeros(num_tasks, jnp.int32),
            squared_norms=jnp.zeros(num_tasks, float),
        )

    def step(state, gram):
        exists = tasks.present(gram)
        counts = jnp.where(exists, optax.safe_increment(state.counts), state.counts)
        # Corrected for its start from 0 as it moves: small squares are not divided.
        rate = (1 - decay) / (1 - decay ** jnp.maximum(counts, 1))
        change = jnp.diagonal(gram) - state.squared_norms
        average = state.squared_norms + jnp.where(exists, rate * change, 0)
        fractions = arguments.for_each_task("tau", tau, num_tasks)
        weights = pcd_weights(gram, average, fractions, main)
        return weights, PCDState(counts, average)

    return base.from_state(init_fn, step, num_tasks, reads=["gram"])


def pcd_weights(
    gram: jax.Array,
    squared_norms: jax.Array,
    tau: jax.typing.ArrayLike = 0.02,
    primary: int = 0,
) -> jax.Array:
    """Weights of :func:`pcd`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      squared_norms: what the squared norms usually are, shape ``(T,)``.
      tau: fraction of progress, a scalar or shape ``(T,)``.
      primary: number of the primary task.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = tasks.present(gram)
    scale = jnp.where(exists, jnp.where(exists, squared_norms, 1) ** -0.5, 0)
    normalized = gram * jnp.outer(scale, scale)
    main = jnp.arange(len(gram)) == primary

    # The dual: the direction is the primary gradient plus multiples of the others.
    required = jnp.asarray(tau) * jnp.diagonal(normalized) - normalized[primary]
    required = jnp.where(main, 0, required)
    hessian = jnp.where(jnp.outer(~main, ~main), normalized, 0)
    multipliers = solvers.nonnegative_qp(hessian, required)
    # In a solution, a constraint with a multiplier holds with equality. Without one,
    # the multipliers grow along a direction in which only rounding errors stop them.
    noise = 10 * jnp.finfo(gram.dtype).eps
    errors = multipliers**2 @ jnp.diagonal(hessian) * noise
    gap = multipliers @ (required - hessian @ multipliers)
    feasible = gap + errors <= 0.5 * (multipliers @ required)
    weights = jnp.where(feasible, multipliers, 0) + main

    squared = weights @ normalized @ weights
    size = (weights @ jnp.sqrt(jnp.diagonal(normalized))) ** 2
    # Gradients that cancel leave rounding errors, which are no direction.
    nothing = squared <= noise * size
    length = gram[primary, primary] / jnp.where(nothing, 1, squared)
    return jnp.where(nothing, 0, weights * scale * jnp.sqrt(length))
