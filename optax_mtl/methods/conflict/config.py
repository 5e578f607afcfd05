"""Conflict-free inverse gradients."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, names, solvers, tasks

LENGTHS = ("projection", "min", "max", "arithmetic", "geometric", "harmonic")


@names.by_name("preference")
def config(
    length: str | int = "projection",
    *,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Conflict-free inverse gradients (ConFIG): equal cosines with all tasks.

    With the matrix :math:`U` of the unit gradients :math:`g_i / \|g_i\|` and its
    pseudo-inverse,

    .. math::

      d = \Big( \sum_i \langle g_i, \hat{d} \, \rangle \Big) \hat{d}, \quad
      \hat{d} = \frac{U^+ p}{\|U^+ p\|}, \quad
      \langle g_i, d \rangle \propto p_i \|g_i\|.

    If the unit gradients are independent, the result conflicts with no task.

    Args:
      length: length of the update: ``"projection"``, the sum of the projections
        above, or the sum of the cosines :math:`\cos(g_i, d)` times the ``"min"``,
        ``"max"``, ``"arithmetic"``, ``"geometric"`` or ``"harmonic"`` mean of the
        norms of the gradients, or times the norm of the task of this number.
      preference: ratios of the cosines, shape ``(T,)`` or a dict by name; by default 1
        for each task.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for an unknown ``length``, and for a negative preference, or one
        of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.config()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.159 2.071 2.071]

    References:
      Liu et al, `ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks <https://arxiv.org/abs/2408.11104>`_, ICLR 2025

    .. note::
      Where :math:`U^+ p` vanishes, as for two opposite gradients, the update is
      zero; the authors' code then divides rounding errors. For two tasks it is
      DCGD-Center of `Dual Cone Gradient Descent
      <https://arxiv.org/abs/2409.18426>`_ (NeurIPS 2024).
    """
    arguments.check_static("length", length)
    if length not in LENGTHS and not isinstance(length, int):
        raise ValueError(
            f"there is no length {length!r}; choose one of {', '.join(LENGTHS)}, or"
            " the number of a task"
        )
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        ratios = arguments.preference_among_present(preference, gram)
        return config_weights(gram, ratios, length)

    return base.from_gram(weights_fn)


def config_weights(
    gram: jax.Array, preference: jax.Array, length: str | int = "projection"
) -> jax.Array:
    """Weights of :func:`config`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: ratios of the cosines, shape ``(T,)``, 0 for absent tasks.
      length: as in :func:`config`.

    Returns:
      Array of shape ``(T,)``.

    Raises:
      ValueError: if ``length`` is the number of a task that does not exist.
    """
    if isinstance(length, int) and not 0 <= length < len(gram):
        raise ValueError(
            f"length={length} is the number of a task, from 0 to {len(gram) - 1}"
        )
    gram, _ = solvers.normalize_gram(gram)  # The weights do not depend on scale.
    exists = tasks.present(gram)
    norms = jnp.sqrt(jnp.diagonal(gram))
    unit_gram = measures.cosine_similarity(gram)
    inverse = solvers.pinv_solve(unit_gram, preference)
    norm_squared = preference @ inverse
    noise = len(gram) * jnp.finfo(gram.dtype).eps * (preference @ preference)
    vanishes = norm_squared <= noise
    # The unit vector in terms of the unit gradients, and its cosines with them.
    unit = jnp.where(
        vanishes, 0, inverse / jnp.sqrt(jnp.where(vanishes, 1, norm_squared))
    )
    cosines = unit_gram @ unit
    if length == "projection":
        size = norms @ cosines
    else:
        size = _mean(length, norms, exists) * cosines.sum()
    return size * jnp.where(exists, unit / jnp.where(exists, norms, 1), 0)


def _mean(kind, norms, exists):
    """The named mean of the norms of the tasks that are present; 0 if none is."""
    if isinstance(kind, int):
        return norms[kind]
    count = jnp.maximum(exists.sum(), 1)
    positive = jnp.where(exists, norms, 1)
    match kind:
        case "min":
            mean = jnp.min(positive, where=exists, initial=1)
        case "max":
            mean = jnp.max(norms)
        case "arithmetic":
            mean = norms.sum() / count
        case "geometric":
            mean = jnp.exp(jnp.log(positive).sum() / count)
        case "harmonic":
            # At least 1, since the norms are at most 1.
            mean = count / jnp.maximum(jnp.sum(1 / positive, where=exists), 1)
    return mean
