"""The sum of the logarithms of the losses."""

import optax

from optax_mtl import arguments, base, names


@names.by_name("min_losses")
def scale_invariant(
    *, min_losses: names.PerTask = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scale-invariant baseline (SI): minimises the sum of the log losses.

    .. math::

      d = \nabla \sum_i \log (L_i - b_i) = \sum_i \frac{g_i}{L_i - b_i}

    The unit of a loss makes no difference.

    Args:
      min_losses: :math:`b`, lower bounds of the losses, one number, shape ``(T,)`` or a
        dict by name. Below its bound a loss has no logarithm, and the weights are NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

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
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    return base.from_losses(base.reciprocal, min_losses=min_losses)
