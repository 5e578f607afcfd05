"""Independent component alignment."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import base, solvers, tasks

SCALE_MODES = ("min", "median", "rmse")


def aligned_mtl(
    scale_mode: str = "min", *, preference: jax.typing.ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Aligned-MTL: task gradients with their principal components made equal.

    With the singular value decomposition :math:`G = U S V^\top` of the matrix whose
    rows are the task gradients, all non-zero singular values are set to one
    :math:`\sigma`, after which the gradients are as little dependent as can be:

    .. math::

      d = \sum_i p_i \hat{g}_i, \quad \hat{G} = \sigma \, U V^\top.

    Args:
      scale_mode: what :math:`\sigma` is among the non-zero singular values: their
        ``"min"`` or ``"median"`` (the lower of two), or the root of the mean of
        their squares, ``"rmse"``.
      preference: weights of the tasks, shape ``(T,)``; by default 1 for each task.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for an unknown ``scale_mode``, and for a negative preference, or
        one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.aligned_mtl()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.427 1.935 1.935]

    References:
      Senushkin et al, `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, CVPR 2023

    .. note::
      Some implementations prefer ``1 / T`` for each task, a mean in place of a sum.
    """
    base.check_choice("scale_mode", scale_mode, SCALE_MODES)
    preference = base.check_preference(preference)

    def weights_fn(gram):
        shares = base.preference_among_present(preference, gram)
        return aligned_mtl_weights(gram, shares, scale_mode)

    return base.from_gram(weights_fn)


def aligned_mtl_weights(
    gram: jax.Array, preference: jax.Array, scale_mode: str = "min"
) -> jax.Array:
    """Weights of :func:`aligned_mtl`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: weights of the tasks, shape ``(T,)``, 0 for tasks that are absent.
      scale_mode: as in :func:`aligned_mtl`.

    Returns:
      Array of shape ``(T,)``.
    """
    gram, _ = solvers.normalize_gram(gram)
    values, vectors = jnp.linalg.eigh(gram)  # Squared singular values, ascending.
    kept = values > len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    rank = kept.sum()
    if scale_mode == "rmse":
        scale = jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1)
    else:
        rank_of_scale = 0 if scale_mode == "min" else (rank - 1) // 2
        scale = values[jnp.minimum(len(gram) - rank + rank_of_scale, len(gram) - 1)]
    ratios = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1)), 0)
    weights = vectors @ (ratios * (vectors.T @ preference))
    return jnp.where(tasks.present(gram), weights, 0)
