"""Independent component alignment."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, names, solvers, tasks

SCALE_MODES = ("min", "median", "rmse")


@names.by_name("preference")
def aligned_mtl(
    scale_mode: str = "min", *, preference: names.PerTask | None = None
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
      preference: weights of the tasks, shape ``(T,)`` or a dict by name; by default 1
        for each task.

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
      Gradients whose matrix of cosines has an eigenvalue below T rounding errors of
      the largest count as dependent: in float32, two at an angle of less than about
      1e-3. The update jumps there, as it does in exact arithmetic where they become
      dependent. A short gradient does not make it jump: with ``"min"`` the update
      shrinks as this gradient does, down to a rounding error of the longest one.

      Some implementations prefer ``1 / T`` for each task, a mean in place of a sum.
    """
    arguments.check_choice("scale_mode", scale_mode, SCALE_MODES)
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        shares = arguments.preference_among_present(preference, gram)
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
    eps = jnp.finfo(gram.dtype).eps
    # A square root of the matrix of cosines, where dependence is told from shortness.
    values, vectors = jnp.linalg.eigh(measures.cosine_similarity(gram))
    independent = values > len(gram) * eps * values[-1]
    root = vectors * jnp.sqrt(jnp.where(independent, values, 0))[None]
    # Its rows times the norms are the gradients but for a rotation. Their singular
    # values are not squared, so that small ones keep their digits.
    norms = jnp.sqrt(jnp.diagonal(gram))
    vectors, values, _ = jnp.linalg.svd(norms[:, None] * root)  # Descending.
    rank = independent.sum()
    kept = jnp.arange(len(gram)) < rank
    values = jnp.where(kept, jnp.maximum(values, eps * values[0]), 1)
    if scale_mode == "rmse":
        squares = jnp.sum(jnp.where(kept, values**2, 0))
        scale = jnp.sqrt(squares / jnp.maximum(rank, 1))
    else:
        place = rank - 1 if scale_mode == "min" else rank // 2
        scale = values[jnp.maximum(place, 0)]
    ratios = jnp.where(kept, scale / values, 0)
    weights = vectors @ (ratios * (vectors.T @ preference))
    return jnp.where(tasks.present(gram), weights, 0)
