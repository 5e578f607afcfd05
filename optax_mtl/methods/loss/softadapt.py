"""SoftAdapt."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, report

VARIANTS = ("ratio", "original", "normalized", "loss_weighted")


class SoftAdaptState(NamedTuple):
    """State of :func:`softadapt`."""

    seen: jax.Array  # Number of losses of each task so far, shape `(T,)`.
    history: jax.Array  # The last losses, the latest first, shape `(order, T)`.

    def __repr__(self):
        return report.describe_state(self)


@names.by_name("min_losses")
def softadapt(
    num_tasks: int,
    *,
    variant: str = "ratio",
    beta: jax.typing.ArrayLike = 0.1,
    order: int = 4,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""SoftAdapt: more weight for losses that fall slowly, or rise.

    With the variant ``"ratio"``, that of libraries for physics-informed networks, or
    by the slopes :math:`s_i` of the losses, the paper's ``"original"``:

    .. math::

      w = T \operatorname{softmax} \frac{L(t)}{L(t - 1)}
      \qquad \text{or} \qquad w = \operatorname{softmax}(\beta s)

    ``"normalized"`` divides the slopes by :math:`\sum_j |s_j|`; ``"loss_weighted"``
    multiplies the exponentials by the mean of the last losses. The slope is the
    backward difference of the given order. Until a task has enough losses, its ratio
    is 1 and its slope 0.

    Args:
      num_tasks: number of tasks, T.
      variant: ``"ratio"``, whose weights sum to T, or ``"original"``,
        ``"normalized"``, ``"loss_weighted"``, whose weights sum to 1.
      beta: :math:`\beta`, of the slopes. With a negative one the losses that fall
        fastest have the most weight.
      order: of the differences, which then read ``order + 1`` losses. At least 1.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which ``"ratio"`` and ``"loss_weighted"`` count them. Below its
        bound one makes the weights NaN. The other two take losses of either sign.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``. A loss of exactly 0 (or exactly at its
      bound) means an absent task, whose history stays.

    Raises:
      ValueError: for another variant and an order that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.softadapt(num_tasks=3)
      >>> updates, state = jnp.eye(3), method.init(None)
      >>> for losses in jnp.array([[1.5, 0.4, 1.0], [1.2, 0.4, 0.7]]):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.96  1.172 0.868]

    References:
      Heydari et al, `SoftAdapt: Techniques for Adaptive Loss Weighting of Neural
      Networks with Multi-Part Loss Functions <https://arxiv.org/abs/1912.12355>`_,
      2019
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_choice("variant", variant, VARIANTS)
    arguments.check_range("beta", beta, "(-inf, inf)")
    arguments.check_count("order", order)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    length = 1 if variant == "ratio" else order

    def init_fn():
        return SoftAdaptState(
            seen=jnp.zeros(num_tasks, jnp.int32),
            history=jnp.zeros((length, num_tasks)),
        )

    def step(state, losses):
        exists, known = losses != 0, state.seen >= length
        last = jnp.concatenate([losses[None], state.history])
        if variant == "ratio":
            ratios = jnp.where(known, losses * base.reciprocal(state.history[0]), 1)
            weights = exists.sum() * base.softmax(ratios, exists)
        else:
            slopes = jnp.where(known & exists, difference(last), 0)
            if variant == "normalized":
                slopes *= base.reciprocal(jnp.abs(slopes).sum())
            weights = base.softmax(slopes * beta, exists)
        if variant == "loss_weighted":
            kept = jnp.arange(length + 1)[:, None] <= state.seen[None]
            weights = weights * jnp.sum(kept * last, axis=0) / kept.sum(axis=0)
            weights = weights * base.reciprocal(weights.sum())
        return weights, SoftAdaptState(
            seen=jnp.where(exists, optax.safe_increment(state.seen), state.seen),
            history=jnp.where(exists, last[:-1], state.history),
        )

    signed = variant in ("original", "normalized")
    return base.from_state(
        init_fn,
        step,
        num_tasks,
        reads=["losses"],
        min_losses=None if signed else min_losses,
    )


def difference(values: jax.Array) -> jax.Array:
    """Derivative at the latest of ``order + 1`` values, the latest first: ``(T,)``.

    Exact for polynomials of the order; the coefficients are those of the derivative
    of backward interpolation, :math:`(-1)^k {n \\choose k} / k`.
    """
    order = len(values) - 1
    later = [(-1) ** k * math.comb(order, k) / k for k in range(1, order + 1)]
    return jnp.array([-sum(later), *later], values.dtype) @ values
