"""Geometric median."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_mtl import arguments, base, solvers, tasks


def geometric_median(num_iters: int = 100) -> optax.GradientTransformationExtraArgs:
    r"""Geometric median: the point with the smallest distances to all gradients.

    .. math::

      d = \arg\min_x \sum_i \|x - g_i\|

    Stays near the gradients of the majority however large the others are. Found by
    Weiszfeld's iteration, weights in inverse proportion to the distances, started
    from the average.

    Args:
      num_iters: number of iterations. They converge slowly where the median is one of
        the gradients. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[2.0, 2], [0, 2], [1, 3], [1, -1e6]])
      >>> method = optax_mtl.geometric_median()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [1. 2.]

    References:
      Pillutla et al, `Robust Aggregation for Federated Learning
      <https://arxiv.org/abs/1912.13445>`_, 2019
    """
    arguments.check_count("num_iters", num_iters, least=0)
    return base.from_gram(lambda gram: geometric_median_weights(gram, num_iters))


def geometric_median_weights(gram: jax.Array, num_iters: int = 100) -> jax.Array:
    """Weights of :func:`geometric_median`, from the Gram matrix, shape ``(T, T)``."""
    gram, _ = solvers.normalize_gram(gram)
    exists = tasks.present(gram)
    info = jnp.finfo(gram.dtype)

    def iterate(_, weights):
        offsets = jnp.eye(len(gram), dtype=gram.dtype) - weights[None]
        squared = jnp.einsum(
            "ij,jk,ik->i", offsets, gram, offsets, precision=lax.Precision.HIGHEST
        )
        # Distances below the rounding errors count as these: no division by zero.
        errors = info.eps * jnp.sum(offsets**2 * jnp.diagonal(gram)[None], axis=1)
        inverse = jnp.maximum(jnp.maximum(squared, errors), info.tiny) ** -0.5
        inverse = jnp.where(exists, inverse, 0)
        return inverse / jnp.maximum(inverse.sum(), info.tiny)

    start = exists / jnp.maximum(exists.sum(), 1).astype(gram.dtype)
    return lax.fori_loop(0, num_iters, iterate, start)
