"""Linear scalarization: fixed weights, by default the plain sum."""

import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


@names.by_name("weights")
def linear(
    weights: names.PerTask = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted sum of the task gradients with fixed weights.

    .. math::

      d = \sum_i w_i g_i

    With the default weights this is the gradient of the sum of the losses: the
    yardstick that every other method has to beat.

    Args:
      weights: one weight for all tasks or array of shape ``(T,)`` or a dict by name, at
        least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for negative weights, or a number of weights other than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1, 1], [6, 1, 1]])
      >>> method = optax_mtl.linear()
      >>> print(method.update(updates, method.init(jnp.zeros(3)))[0])
      [2. 2. 2.]

    References:
      Kurin et al, `In Defense of the Unitary Scalarization for Deep Multi-Task
      Learning <https://arxiv.org/abs/2201.04122>`_, NeurIPS 2022
    """
    preference = arguments.check_preference(weights)

    def step(state, count):
        return arguments.for_each_task("weights", preference, count), state

    return base.from_state(optax.EmptyState, step, reads=[])


def mean() -> optax.GradientTransformationExtraArgs:
    r"""Average of the task gradients.

    .. math::

      d = \frac{1}{T} \sum_i g_i

    T counts all tasks, absent ones too, so that this is the sum times a constant, the
    gradient of ``losses.mean()``, and no gradient has to be looked at.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1, 1], [6, 1, 1]])
      >>> method = optax_mtl.mean()
      >>> print(method.update(updates, method.init(jnp.zeros(3)))[0])
      [1. 1. 1.]

    References:
      Kurin et al, `In Defense of the Unitary Scalarization for Deep Multi-Task
      Learning <https://arxiv.org/abs/2201.04122>`_, NeurIPS 2022
    """
    return base.from_state(
        optax.EmptyState,
        lambda state, count: (jnp.full(count, 1 / count), state),
        reads=[],
    )


def sum_tasks() -> optax.GradientTransformationExtraArgs:
    """Sums over the task axis: :func:`linear` by the name of what it does.

    For the group of :func:`optax.partition` whose stacked gradients nothing should
    resolve, such as heads.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> tx = optax.partition(
      ...     {"trunk": optax_mtl.cagrad(c=0.0), "head": optax_mtl.sum_tasks()},
      ...     {"trunk": "trunk", "head": "head"},
      ... )
      >>> params = {"trunk": jnp.zeros(2), "head": jnp.zeros(2)}
      >>> updates = {"trunk": jnp.eye(2), "head": jnp.eye(2)}
      >>> update, _ = tx.update(updates, tx.init(params), params)
      >>> print(update["trunk"], update["head"])
      [0.5 0.5] [1. 1.]
    """
    return linear()


def mean_tasks() -> optax.GradientTransformationExtraArgs:
    """Averages over the task axis: :func:`mean` by the name of what it does.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.mean_tasks()
      >>> print(method.update(jnp.eye(2), method.init(None))[0])
      [0.5 0.5]
    """
    return mean()
