"""Variance risk extrapolation."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base


def v_rex(
    beta: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Variance risk extrapolation (V-REx): the mean of the losses and their variance.

    .. math::

      \min_\theta \; \frac{1}{T} \sum_i L_i + \beta \operatorname{Var}(L)
      \quad \Rightarrow \quad
      w_i = \frac{1}{T} + \frac{2 \beta}{T} (L_i - \bar{L})

    so that tasks (there: environments) come to have equal losses. The weight of a task
    whose loss is far below the mean is negative: it is unlearned.

    Args:
      beta: :math:`\beta`, weight of the variance. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``. A loss of exactly 0 means an absent
      task.

    Raises:
      ValueError: for a negative ``beta``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.v_rex()
      >>> losses = jnp.array([1.2, 0.4, 0.7])
      >>> update, _ = method.update(jnp.eye(3), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.622 0.089 0.289]

    References:
      Krueger et al, `Out-of-Distribution Generalization via Risk Extrapolation (REx)
      <https://arxiv.org/abs/2003.00688>`_, ICML 2021

    .. note::
      The paper begins with a small ``beta`` and raises it after some steps:
      :func:`optax.inject_hyperparams` with a schedule does so.
    """
    arguments.check_range("beta", beta, "[0, inf)")
    return base.from_losses(lambda losses: v_rex_weights(losses, beta))


def v_rex_weights(losses: jax.Array, beta: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """Weights of :func:`v_rex`, from the losses, shape ``(T,)``, 0 if absent."""
    exists = losses != 0
    share = base.reciprocal(exists.sum().astype(losses.dtype))
    mean = share * losses.sum()
    return jnp.where(exists, share * (1 + 2 * beta * (losses - mean)), 0)
