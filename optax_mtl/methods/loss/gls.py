"""Geometric loss strategy."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


@names.by_name("min_losses")
def gls(*, min_losses: names.PerTask = 0.0) -> optax.GradientTransformationExtraArgs:
    r"""Geometric loss strategy (GLS): descent on the geometric mean of the losses.

    .. math::

      d = \nabla \Big( \prod_i L_i \Big)^{1 / T} = \sum_i w_i g_i, \quad
      w_i = \frac{1}{T L_i} \Big( \prod_j L_j \Big)^{1 / T}

    The factor of a loss does not change the ratios of the weighted gradients.

    Args:
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound one has no root: the weights
        are NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method, losses = optax_mtl.gls(), jnp.array([2.0, 0.5, 1.0])
      >>> update, _ = method.update(
      ...     jnp.eye(3), method.init(jnp.zeros(3)), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.167 0.667 0.333]

    References:
      Chennupati et al, `MultiNet++: Multi-Stream Feature Aggregation and Geometric
      Loss Strategy for Multi-Task Learning <https://arxiv.org/abs/1904.08492>`_,
      CVPR Workshops 2019
    """
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    return base.from_losses(gls_weights, min_losses=min_losses)


def gls_weights(losses: jax.Array) -> jax.Array:
    """Weights of :func:`gls`, from the losses; NaN for a negative loss."""
    exists = losses != 0
    count = jnp.maximum(exists.sum(), 1)
    logs = jnp.log(jnp.where(exists, losses, 1))  # Sums neither over- nor underflow.
    return jnp.where(exists, jnp.exp(logs.sum() / count - logs) / count, 0)
