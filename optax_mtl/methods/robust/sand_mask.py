"""Smooth masks of coordinates in which the tasks agree."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments
from optax_mtl.methods.robust.and_mask import masked_mean


def sand_mask(
    threshold: jax.typing.ArrayLike = 0.5, k: jax.typing.ArrayLike = 10.0
) -> optax.GradientTransformationExtraArgs:
    r"""SAND-mask: the average gradient where the tasks agree, also on its size.

    .. math::

      d_p = \frac{m_p}{\bar m} \cdot \frac1T \sum_i g_{ip}, \quad
      m_p = \max\left(0, \tanh \frac{k}{\sigma_p^2} \left(\Big|
      \frac1T \sum_i \operatorname{sign} g_{ip} \Big| - \tau \right) \right),

    where :math:`\sigma_p^2` is the variance between the tasks, and :math:`\bar m` the
    mean of the mask over all coordinates of a tensor. Where the tasks are equal, the
    mask is 1.

    Args:
      threshold: :math:`\tau`, the agreement of signs that is needed, between 0 and 1;
        at 1 the update is zero.
      k: steepness, in the unit of squared gradients. Positive.

    Returns:
      A gradient transformation that aggregates stacked updates. It is zero in a tensor
      without any agreement.

    Raises:
      ValueError: for numbers out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 5.0]])
      >>> method = optax_mtl.sand_mask(k=2.0)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.    2.668 0.995]

    References:
      Shahtalebi et al, `SAND-mask: An Enhanced Gradient Masking Strategy for the
      Discovery of Invariances in Domain Generalization
      <https://arxiv.org/abs/2106.02266>`_, 2021

    .. note::
      The default of ``k`` is that of DomainBed, which has a ``threshold`` of 1 by
      default, where the mask is 0, and draws others between 0 and 1. It adds 1e-10 to
      the mean of the mask, which large gradients may be below; here nothing is added.
    """
    arguments.check_range("threshold", threshold, "[0, 1]")
    arguments.check_range("k", k, "(0, inf)")

    def mask(excess, variance):
        slope = k * jnp.maximum(excess, 0)
        # Of 10 and more the tanh is 1.
        steep = slope / jnp.where(slope > 0, jnp.maximum(variance, slope / 32), 1)
        return jnp.where(jnp.isfinite(variance), jnp.tanh(steep), jnp.nan)

    return masked_mean(threshold, mask)
