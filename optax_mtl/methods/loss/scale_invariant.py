"""The sum of the logarithms of the losses."""

import optax

from optax_mtl import base


def scale_invariant() -> optax.GradientTransformationExtraArgs:
    r"""Scale-invariant baseline (SI): minimises the sum of the log losses.

    .. math::

      d = \nabla \sum_i \log L_i = \sum_i \frac{g_i}{L_i}

    The unit of a loss makes no difference.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above 0. A loss of exactly 0
      means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.scale_invariant()
      >>> losses = jnp.array([2.0, 0.5, 1.0])
      >>> print(method.update(jnp.eye(3), method.init(None), losses=losses)[0])
      [0.5 2.  1. ]

    References:
      Navon et al, `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022, as a baseline
    """
    return base.from_losses(base.reciprocal)
