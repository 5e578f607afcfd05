"""Learning-rate annealing for physics-informed networks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks


class LRAnnealingState(NamedTuple):
    """State of :func:`lr_annealing`."""

    weights: jax.Array  # Of all tasks, that of the residual not used, `(num_tasks,)`.


@names.by_name(of_tasks=["primary"])
def lr_annealing(
    num_tasks: int,
    *,
    primary: names.Task = 0,
    decay: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Learning-rate annealing: conditions weighed against the residual of an equation.

    .. math::

      \lambda_i \leftarrow a \lambda_i + (1 - a) \,
      \frac{\max_k |g_{r,k}|}{\frac1P \sum_k |g_{i,k}|}, \qquad
      d = g_r + \sum_{i \ne r} \lambda_i g_i,

    over the entries :math:`k` of all P parameters, from :math:`\lambda_i = 1`. As a
    largest entry is much larger than a mean one, the conditions get far longer
    gradients than the residual.

    Args:
      num_tasks: number of tasks, T.
      primary: number or name of the residual, :math:`r`.
      decay: :math:`a`. In [0, 1).

    Returns:
      A gradient transformation that aggregates stacked updates. Without a gradient of
      the residual the weights stay as they are.

    Raises:
      ValueError: for a task that does not exist.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.lr_annealing(num_tasks=2, decay=0.5)
      >>> updates, state = jnp.array([[1.0, -3], [0.5, 0.5]]), method.init(jnp.zeros(2))
      >>> update, _ = method.update(updates, state)  # (1 + 3 / 0.5) / 2 = 3.5
      >>> print(update)
      [ 2.75 -1.25]

    References:
      Wang et al, `Understanding and Mitigating Gradient Flow Pathologies in
      Physics-Informed Neural Networks <https://arxiv.org/abs/2001.04536>`_, SIAM
      Journal on Scientific Computing 2021

    .. note::
      The paper writes :math:`1 - \alpha` for the decay and recommends
      :math:`\alpha = 0.9`; its code decays by 0.9, every ten steps, and averages the
      means of the layers, of the gradients of :math:`\lambda_i L_i`. Others take
      something else: PhysicsNeMo the mean :math:`|g_{r,k}|` in the numerator, with a
      decay of 0.99; jinns the absolute value of the mean :math:`g_{i,k}` of each tensor
      in the denominator, with a decay of 0.1.
    """
    arguments.check_count("num_tasks", num_tasks)
    main = arguments.check_primary(primary, num_tasks)
    arguments.check_range("decay", decay, "[0, 1)")

    def init(params):
        del params
        return LRAnnealingState(jnp.ones(num_tasks, float))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        leaves = jax.tree.leaves(updates)
        sizes = [tasks.largest(x, tuple(range(1, x.ndim))) for x in leaves]
        size = jnp.max(jnp.stack([x.astype(float) for x in sizes]), axis=0)
        # Relative to the largest, so that the sums do not overflow.
        unit = jnp.where(size > 0, size, 1)
        total = tasks.sum_leaves([_sum_of_sizes(x, unit) for x in leaves])
        count = sum(x[0].size for x in leaves)
        exists = (size > 0) & (size[main] > 0)
        ratio = count * base.reciprocal(total) * (size[main] / unit)
        moved = decay * state.weights + (1 - decay) * ratio
        weights = jnp.where(exists, moved, state.weights)
        weights = jnp.where(base.all_finite((size, total)), weights, jnp.nan)
        is_main = jnp.arange(num_tasks) == main
        out = tasks.combine(jnp.where(is_main, 1, weights), updates)
        new_state = LRAnnealingState(jnp.where(is_main, 1, weights))
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return base.from_coordinates(init, update)


def _sum_of_sizes(x, unit):
    """Sum of the magnitudes of the entries of each task, in units of its own."""
    precise = jnp.abs(x.astype(unit.dtype)) / tasks.along_tasks(unit, x)
    return jnp.sum(precise, axis=tuple(range(1, x.ndim)))
