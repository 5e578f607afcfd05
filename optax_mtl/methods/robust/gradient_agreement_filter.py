"""Gradient agreement filtering."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers, tasks


def gradient_agreement_filter(
    threshold: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient agreement filtering (GAF): an average of those that agree with it.

    Goes through the gradients in their order, from the first, and takes each into the
    average that is not too far from it by the cosine, at equal shares:

    .. math::

      c \leftarrow \begin{cases}
      (c + g_k) / 2 & \text{if } 1 - \cos(c, g_k) \le \tau, \\
      c & \text{otherwise}.
      \end{cases}

    If none agrees with the first, there is no update. It is made for gradients of the
    same loss on several micro-batches or devices, some of which are noise, rather than
    for those of different tasks: the last to agree has half of the weight.

    Args:
      threshold: :math:`\tau`, the largest distance by the cosine; 1 leaves out what
        conflicts, and the authors recommend 0.9 to 1. Between 0 and 2.

    Returns:
      A gradient transformation that aggregates stacked updates. A gradient that alone
      is present has nothing to agree with, and is the update.

    Raises:
      ValueError: for a ``threshold`` out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 1], [-1, -1], [3, 1], [0, 2]])
      >>> method = optax_mtl.gradient_agreement_filter()
      >>> print(method.update(updates, method.init(None))[0])
      [1.  1.5]

    References:
      Chaubard et al, `Beyond Gradient Averaging in Parallel Optimization: Improved
      Robustness through Gradient Agreement Filtering
      <https://arxiv.org/abs/2412.18052>`_, 2024
    """
    arguments.check_range("threshold", threshold, "[0, 2]")
    return base.from_gram(
        lambda gram: gradient_agreement_filter_weights(gram, threshold)
    )


def gradient_agreement_filter_weights(
    gram: jax.Array, threshold: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    """Weights of :func:`gradient_agreement_filter`, from the Gram matrix."""
    gram, _ = solvers.normalize_gram(gram)
    exists = tasks.present(gram)
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    # Rounding errors do not decide at the threshold.
    least = 1 - threshold - 4 * len(gram) * jnp.finfo(gram.dtype).eps

    def visit(carry, k):
        weights, number = carry
        product = weights @ gram[k]
        norm2, noise = solvers.combined_norm2(gram, weights)
        vanishes = norm2 <= noise  # It has no direction, and a cosine of 0.
        bound = jnp.where(vanishes, 0, jnp.sqrt(norm2 * gram[k, k]))
        agrees = jnp.where(vanishes, least <= 0, product >= least * bound)
        average = (weights + identity[k]) / jnp.minimum(number + 1, 2)
        joins = exists[k] & (agrees | (number == 0))
        return (jnp.where(joins, average, weights), number + joins), None

    start = 0 * identity[0], jnp.zeros([], jnp.int32)
    (weights, number), _ = jax.lax.scan(visit, start, jnp.arange(len(gram)))
    return jnp.where((number > 1) | (exists.sum() == 1), weights, 0)
