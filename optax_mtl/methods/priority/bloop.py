"""Bloop: a secondary gradient orthogonal to the average primary one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, report, tasks


class BloopState(NamedTuple):
    """State of :func:`bloop`."""

    steps: jax.Array  # Primary gradients seen.
    average: optax.Updates  # Moving average of the primary gradient.

    def __repr__(self):
        return report.describe_state(self)


@names.by_name(of_tasks=["primary"])
def bloop(
    weight: jax.typing.ArrayLike = 0.1,
    *,
    step_size: jax.typing.ArrayLike = 0.1,
    primary: names.Task = 0,
    subtract: str = "average",
    barrier: bool = False,
    rescale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Bilevel optimization with orthogonal projection (Bloop).

    Follows the primary gradient :math:`g_p`, and of the gradient :math:`a` of all
    other losses what is orthogonal to the moving average :math:`E` of the primary
    one, which is less noisy than the gradient of one batch:

    .. math::

      E \leftarrow E + \rho \, (g_p - E), \qquad
      d = g_p + \lambda \left(a - \frac{\langle a, E \rangle}{\|E\|^2} E\right),
      \qquad a = \sum_{i \ne p} g_i.

    The first gradient starts the average.

    Args:
      weight: of the secondary gradient, :math:`\lambda`. At least 0.
      step_size: of the moving average, :math:`\rho`; 1 is no averaging. In (0, 1].
      primary: number or name of the primary task, :math:`p`.
      subtract: whether to subtract multiples of the ``"average"``, as in the
        formula, or of the primary ``"gradient"`` itself, with the same ratio.
      barrier: whether to subtract at most :math:`E / \lambda`: a secondary gradient
        that agrees well with the primary one may replace it. With ``step_size=1``
        this is :func:`~optax_mtl.dynamic_barrier`.
      rescale: whether to divide the update by :math:`1 + \lambda`.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for an unknown ``subtract`` and, at the first update, for a task
        that does not exist.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[2.0, 0], [5, 1]])
      >>> method = optax_mtl.bloop(weight=0.5)
      >>> print(method.update(updates, method.init(jnp.zeros(2)))[0])
      [2.  0.5]

    References:
      Hsieh et al, `Careful with that Scalpel: Improving Gradient Surgery with an EMA
      <https://arxiv.org/abs/2402.02998>`_, ICML 2024

    .. note::
      The authors' code adds 1e-7 to the squared norm of the average, and rescales by
      ``1 + weight`` where its paper divides by it. Without an average
      (``step_size=1``) it is ``weight`` times :func:`~optax_mtl.dynamic_barrier` with
      ``beta=1 / weight``.
    """
    arguments.check_range("weight", weight, "[0, inf)")
    arguments.check_range("step_size", step_size, "(0, 1]")
    arguments.check_primary(primary)
    arguments.check_choice("subtract", subtract, ("average", "gradient"))
    arguments.check_choice("barrier", barrier, (True, False))
    arguments.check_choice("rescale", rescale, (True, False))

    def init_fn(params):
        return BloopState(
            steps=jnp.zeros([], jnp.int32),
            average=base.zeros_like(params, dtype=float),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        count = tasks.check_stacked(updates, params)
        if count is None:
            return updates, state
        number = arguments.check_primary(primary, count)
        precise = jax.tree.map(
            lambda g, e: jnp.asarray(g, e.dtype), updates, state.average
        )
        main = jax.tree.map(lambda g: g[primary], precise)
        others = (jnp.arange(count) != number).astype(float)
        secondary = tasks.combine(others, precise)

        alone = lambda tree: jax.tree.map(lambda x: x[None], tree)
        exists = tasks.squared_norms(alone(main))[0] > 0
        step = jnp.where(exists, jnp.where(state.steps == 0, 1, step_size), 0)
        average = optax.incremental_update(main, state.average, step)
        products = tasks.inner_products(
            alone(average), alone(average), alone(secondary)
        )
        squared, dot = (product[0, 0] for product in products)
        ratio = dot / jnp.where(squared > 0, squared, 1)
        ratio = jnp.where(jnp.isfinite(squared), ratio, jnp.nan)
        if barrier:
            ratio = jnp.minimum(ratio, 1 / weight)

        reference = average if subtract == "average" else main
        total = 1 + weight if rescale else 1
        direction = jax.tree.map(
            lambda m, a, r: (m + weight * (a - ratio * r)) / total,
            main,
            secondary,
            reference,
        )
        new_state = BloopState(
            steps=jnp.where(exists, optax.safe_increment(state.steps), state.steps),
            average=average,
        )
        new_state = base.keep_if(base.all_finite(direction), new_state, state)
        cast = lambda d, g: d.astype(g.dtype)
        return jax.tree.map(cast, direction, updates), new_state

    return base.from_coordinates(init_fn, update_fn)
