"""Scaled loss approximate weighting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base


class SLAWState(NamedTuple):
    """State of :func:`slaw`; each of shape `(T,)`."""

    counts: jax.Array  # Losses seen.
    means: jax.Array  # Of the losses.
    variances: jax.Array


def slaw(
    num_tasks: int, *, decay: jax.typing.ArrayLike = 0.99
) -> optax.GradientTransformationExtraArgs:
    r"""Scaled loss approximate weighting (SLAW): losses by how much they vary.

    .. math::

      w_i = T \, \frac{1 / \sigma_i}{\sum_j 1 / \sigma_j}, \quad
      \sigma_i^2 = \overline{L_i^2} - \overline{L_i}^2,

    with running means up to this step: where steps are small, losses vary by their
    length times that of the gradient, so that this is :func:`~optax_mtl.inverse_norm`
    without gradients. The weights are 1 until each task has been seen twice.

    Args:
      num_tasks: number of tasks, T.
      decay: of the means, which are plain ones as long as that forgets faster. At least
        0 and below 1.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, of either sign. A loss of exactly 0
      means an absent task, whose statistics stay.

    Raises:
      ValueError: for a ``decay`` out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.slaw(num_tasks=2)
      >>> updates, state = jnp.eye(2), method.init(None)
      >>> for losses in jnp.array([[2.0, 1.0], [1.0, 0.9], [1.5, 0.7]]):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.468 1.532]

    References:
      Crawshaw and Košecká, `SLAW: Scaled Loss Approximate Weighting for Efficient
      Multi-Task Learning <https://arxiv.org/abs/2109.08218>`_, 2021

    .. note::
      The authors' code counts deviations below 1e-5 as that; here it is 1e-5 times the
      largest, so that the unit of the losses does not matter.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("decay", decay, "[0, 1)")

    def init_fn():
        zeros = lambda: jnp.zeros(num_tasks)
        return SLAWState(jnp.zeros(num_tasks, jnp.int32), zeros(), zeros())

    def step(state, losses):
        exists = losses != 0
        seen = state.counts.astype(float)  # Else float32, whatever the precision.
        kept = jnp.minimum(seen / (seen + 1), decay)
        change = losses - state.means
        moved = SLAWState(
            counts=optax.safe_increment(state.counts),
            means=state.means + (1 - kept) * change,
            # The difference of the means, without its cancellation.
            variances=kept * (state.variances + (1 - kept) * change**2),
        )
        stay = lambda new, old: jnp.where(exists, new, old).astype(old.dtype)
        state = jax.tree.map(stay, moved, state)
        known = jnp.all((state.counts >= 2) | ~exists)
        deviations = jnp.where(exists & known, jnp.sqrt(state.variances), 0)
        return exists.sum() * slaw_weights(deviations, exists), state

    return base.from_state(init_fn, step, num_tasks, reads=["losses"])


def slaw_weights(deviations: jax.Array, exists: jax.Array) -> jax.Array:
    """Weights of :func:`slaw` over the number of tasks, from how much losses vary.

    Args:
      deviations: standard deviations of the losses, shape ``(T,)``, in the same unit.
      exists: tasks that are present, shape ``(T,)``.

    Returns:
      Array of shape ``(T,)``, which sums to 1; equal shares if nothing varies.
    """
    floor = 1e-5 * jnp.max(jnp.where(exists, deviations, 0))
    sizes = 1 / jnp.where(floor > 0, jnp.maximum(deviations, floor), 1)
    sizes = jnp.where(exists, sizes, 0)
    return sizes * base.reciprocal(sizes.sum())
