"""Coefficient of variation weighting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


class CoVWeightingState(NamedTuple):
    """State of :func:`cov_weighting`; each of shape `(T,)`."""

    counts: jax.Array  # Losses seen.
    mean_losses: jax.Array
    mean_ratios: jax.Array  # Of losses to their means.
    squares: jax.Array  # Sums of the squared deviations of the ratios.


@names.by_name("min_losses")
def cov_weighting(
    num_tasks: int,
    *,
    decay: jax.typing.ArrayLike | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Coefficient of variation weighting: more weight for losses that still vary.

    .. math::

      w_i = \frac{c_i}{\sum_j c_j}, \quad c_i = \frac{\sigma_{l_i}}{\mu_{l_i}}, \quad
      l_i(t) = \frac{L_i(t)}{\mu_{L_i}(t - 1)},

    with means and standard deviations over the steps before this one; in the first two
    the weights are :math:`1 / T`.

    Args:
      num_tasks: number of tasks, T.
      decay: of the means, at least 0 and below 1; by default they are over all steps.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task, whose statistics stay.

    Raises:
      ValueError: for a decay that is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.cov_weighting(num_tasks=2)
      >>> updates, state = jnp.eye(2), method.init(None)
      >>> for losses in jnp.array([[2.0, 1.0], [1.0, 0.9], [1.0, 0.9]]):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.864 0.136]

    References:
      Groenendijk et al, `Multi-Loss Weighting with Coefficient of Variations
      <https://arxiv.org/abs/2009.01717>`_, WACV 2021

    .. note::
      As in the authors' code, a variance has 1e-8 added to it, and the sum of squares
      is over all steps, also with a decay.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("decay", decay, "[0, 1)", optional=True)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")

    def init_fn():
        zeros = lambda: jnp.zeros(num_tasks)
        counts = jnp.zeros(num_tasks, jnp.int32)
        return CoVWeightingState(counts, zeros(), zeros(), zeros())

    def step(state, losses):
        exists, first = losses != 0, state.counts == 0
        variance = state.squares / jnp.maximum(state.counts, 1)
        deviations = jnp.sqrt(variance + 1e-8)  # Ratios have no unit.
        known = jnp.all((state.counts >= 2) | ~exists)
        variations = deviations * base.reciprocal(state.mean_ratios)
        sizes = jnp.where(exists, jnp.where(known, variations, 1), 0)
        weights = sizes * base.reciprocal(sizes.sum())

        ratios = jnp.where(first, 1, losses * base.reciprocal(state.mean_losses))
        seen = state.counts.astype(float)  # Else float32, whatever the precision.
        kept = seen / (seen + 1)
        if decay is not None:
            kept = jnp.where(first, 0, decay)
        mean_ratios = kept * state.mean_ratios + (1 - kept) * ratios
        before = jnp.where(first, ratios, state.mean_ratios)
        moved = CoVWeightingState(
            counts=optax.safe_increment(state.counts),
            mean_losses=kept * state.mean_losses + (1 - kept) * losses,
            mean_ratios=mean_ratios,
            squares=state.squares + (ratios - before) * (ratios - mean_ratios),
        )
        stay = lambda new, old: jnp.where(exists, new, old)
        return weights, jax.tree.map(stay, moved, state)

    return base.from_state(
        init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses
    )
