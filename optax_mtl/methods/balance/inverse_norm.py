"""Weights inversely proportional to the norms of the gradients."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers

_TARGETS = ("mean", "max", "harmonic")


def inverse_norm(target: str = "mean") -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradients of all tasks to the same norm, and sums them.

    .. math::

      d = \sum_i \frac{c}{\|g_i\|} g_i

    Args:
      target: the common norm :math:`c`: the ``"mean"`` of the norms, their
        ``"max"``, or their ``"harmonic"`` mean, with which the weights sum to T.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for another target.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[3.0, 4.0], [0.0, 1.0]])
      >>> method = optax_mtl.inverse_norm()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [1.8 5.4]

    References:
      Lin et al, `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023, whose second half it is, with the
      target ``"max"``.

    .. note::
      There is no paper of its own; the same weights are part of several methods.
    """
    arguments.check_choice("target", target, _TARGETS)
    return base.from_gram(lambda gram: inverse_norm_weights(gram, target))


def inverse_norm_weights(gram: jax.Array, target: str = "mean") -> jax.Array:
    """Weights of :func:`inverse_norm`, from the Gram matrix."""
    gram, _ = solvers.normalize_gram(gram)  # The weights do not depend on scale.
    norms = jnp.sqrt(jnp.diagonal(gram))
    inverse = base.reciprocal(norms)
    count = jnp.maximum(jnp.sum(norms > 0), 1)
    if target == "max":
        return norms.max() * inverse
    if target == "mean":
        return norms.sum() / count * inverse
    return count * base.reciprocal(inverse.sum()) * inverse
