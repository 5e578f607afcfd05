"""Relative loss balancing with random lookback."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


class ReLoBRaLoState(NamedTuple):
    """State of :func:`relobralo`."""

    key: jax.Array
    steps: jax.Array
    seen: jax.Array  # Number of losses of each task so far, shape `(T,)`.
    first: jax.Array  # Its first loss, shape `(T,)`.
    last: jax.Array  # Its last one, shape `(T,)`.
    weights: jax.Array  # Shape `(T,)`.


@names.by_name("min_losses")
def relobralo(
    num_tasks: int,
    *,
    alpha: jax.typing.ArrayLike = 0.999,
    temperature: jax.typing.ArrayLike = 1.0,
    rho: jax.typing.ArrayLike = 0.999,
    key: int | jax.Array = 0,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Relative loss balancing with random lookback (ReLoBRaLo).

    More weight for losses that fell little, since the last step and, now and then,
    since the first one:

    .. math::

      w(t) = \alpha \left( r \, w(t - 1) + (1 - r) \, h(t, 0) \right)
      + (1 - \alpha) \, h(t, t - 1), \quad
      h(t, s) = T \operatorname{softmax} \frac{L(t)}{\tau L(s)},

    where :math:`r` is 1 with the probability :math:`\rho` and otherwise 0. The weights
    are 1 in the first step.

    Args:
      num_tasks: number of tasks, T.
      alpha: :math:`\alpha`, how much of the weights is kept. Between 0 and 1.
      temperature: :math:`\tau`; a large one makes the weights equal. Positive.
      rho: :math:`\rho`, probability of no lookback. Between 0 and 1.
      key: seed or typed random key.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task, whose state stays.

    Raises:
      ValueError: for numbers out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.relobralo(num_tasks=3, alpha=0.5)
      >>> updates, state = jnp.eye(3), method.init(None)
      >>> for losses in jnp.array([[1.5, 0.4, 1.0], [1.2, 0.4, 0.7]]):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.98  1.086 0.934]

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep
      Learning <https://arxiv.org/abs/2110.09813>`_, 2021

    .. note::
      The authors' code takes :math:`\alpha = 0` in the second step.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("alpha", alpha, "[0, 1]")
    arguments.check_range("temperature", temperature, "(0, inf)")
    arguments.check_range("rho", rho, "[0, 1]")
    arguments.check_key(key)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")

    def init_fn():
        return ReLoBRaLoState(
            key=arguments.key_data(key),
            steps=jnp.zeros([], jnp.int32),
            seen=jnp.zeros(num_tasks, jnp.int32),
            first=jnp.ones(num_tasks),
            last=jnp.ones(num_tasks),
            weights=jnp.ones(num_tasks),
        )

    def step(state, losses):
        exists, seen = losses != 0, state.seen
        draw = jax.random.fold_in(arguments.key_of(state.key, key), state.steps)
        stays = jax.random.bernoulli(draw, rho)

        def since(earlier):
            ratios = jnp.where(seen > 0, losses * base.reciprocal(earlier), 1)
            return exists.sum() * base.softmax(ratios / temperature, exists)

        kept = jnp.where(stays, state.weights, since(state.first))
        weights = alpha * kept + (1 - alpha) * since(state.last)
        stay = lambda new, old: jnp.where(exists, new, old)
        return jnp.where(exists, weights, 0), ReLoBRaLoState(
            key=state.key,
            steps=optax.safe_increment(state.steps),
            seen=stay(optax.safe_increment(seen), seen),
            first=stay(jnp.where(seen > 0, state.first, losses), state.first),
            last=stay(losses, state.last),
            weights=stay(weights, state.weights),
        )

    return base.from_state(
        init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses
    )
