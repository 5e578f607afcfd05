"""Soft optimal uncertainty weighting."""

import jax
import optax

from optax_mtl import arguments, base, names


@names.by_name("min_losses")
def uw_so(
    temperature: jax.typing.ArrayLike = 1.0,
    *,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Soft optimal uncertainty weighting (UW-SO).

    Takes the closed-form optimum of uncertainty weighting, the inverse losses,
    through a softmax:

    .. math::

      w = \operatorname{softmax}\left(\frac{1}{\tau L}\right)

    Args:
      temperature: :math:`\tau`, to be tuned; a large one makes the weights equal.
        Positive.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Raises:
      ValueError: for a temperature that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.uw_so()
      >>> losses = jnp.array([2.0, 0.5, 1.0])
      >>> update, _ = method.update(jnp.eye(3), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.14  0.629 0.231]

    References:
      Kirchdorfer et al, `Analytical Uncertainty-Based Loss Weighting in Multi-Task
      Learning <https://arxiv.org/abs/2408.07985>`_, 2024

    .. note::
      Agrees with the authors' code to 7e-8.
    """
    arguments.check_range("temperature", temperature, "(0, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    return base.from_losses(
        lambda losses: uw_so_weights(losses, temperature), min_losses=min_losses
    )


def uw_so_weights(
    losses: jax.Array, temperature: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    """Weights of :func:`uw_so` from the losses, shape ``(T,)``."""
    return base.softmax(base.reciprocal(losses) / temperature, losses != 0)
