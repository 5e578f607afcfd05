"""Masks of coordinates in which the tasks agree."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, tasks


def and_mask(
    threshold: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""AND-mask: the average gradient where enough tasks agree on its sign.

    .. math::

      d_p = \frac{m_p}{\bar m} \cdot \frac1T \sum_i g_{ip}, \quad
      m_p = 1 \text{ if }
      \Big| \frac1T \sum_i \operatorname{sign} g_{ip} \Big| \ge \tau
      \text{, else } 0,

    where :math:`\bar m` is the mean of the mask over all coordinates of a tensor, so
    that those that are left make up for the others.

    Args:
      threshold: :math:`\tau`, the agreement that is needed, between 0 and 1; at 1 all
        signs are equal.

    Returns:
      A gradient transformation that aggregates stacked updates. It is zero in a tensor
      without any agreement.

    Raises:
      ValueError: for a ``threshold`` out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.and_mask()
      >>> print(method.update(updates, method.init(jnp.zeros(3)))[0])
      [0.  1.5 1.5]

    References:
      Parascandolo et al, `Learning Explanations That Are Hard to Vary
      <https://arxiv.org/abs/2009.00329>`_, ICLR 2021
    """
    arguments.check_range("threshold", threshold, "[0, 1]")

    def mask(excess, variance):
        del variance
        return (excess >= 0).astype(excess.dtype)

    return masked_mean(threshold, mask)


def masked_mean(
    threshold: jax.typing.ArrayLike,
    mask_fn: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Makes a method out of a mask of the average gradient, scaled to a mean of 1.

    Args:
      threshold: how far the signs should agree, between 0 and 1.
      mask_fn: maps, for each coordinate of a tensor, how much more they agree and the
        variance between the tasks to numbers between 0 and 1.

    Returns:
      A gradient transformation that aggregates stacked updates.
    """

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params) is None:
            return updates, state
        exists = tasks.has_gradient(updates)
        mask = lambda x: _masked_mean(x, exists, threshold, mask_fn)
        return jax.tree.map(mask, updates), state

    return base.from_coordinates(optax.init_empty_state, update_fn)


def _masked_mean(x, exists, threshold, mask_fn):
    accurate = jnp.promote_types(x.dtype, jnp.float32)
    exists = exists.astype(accurate)
    count = jnp.maximum(exists.sum(), 1)
    of_tasks = lambda fn: coordinates.reduce(
        jnp.add,
        coordinates.each(lambda g, here: fn(g.astype(accurate), here), x, exists),
    )
    mean = of_tasks(lambda g, here: g) / count
    excess = jnp.abs(of_tasks(lambda g, here: jnp.sign(g))) / count - threshold
    # At the threshold rounding errors do not decide.
    excess = jnp.where(jnp.abs(excess) > 4 * jnp.finfo(accurate).eps, excess, 0)
    squares = of_tasks(lambda g, here: here * (g - mean) ** 2)
    mask = mask_fn(excess, squares / jnp.maximum(count - 1, 1))
    average = jnp.mean(mask)
    out = mask * mean / jnp.where(average == 0, 1, average)
    # What is not finite is not masked: the step is to be skipped.
    return jnp.where(jnp.isfinite(mean), out, jnp.nan).astype(x.dtype)
