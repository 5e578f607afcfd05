"""Fair resource allocation in multi-task learning."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers


@names.by_name("preference")
def fairgrad(
    alpha: jax.typing.ArrayLike = 2.0,
    *,
    max_norm: jax.typing.ArrayLike | None = 1.0,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FairGrad: an alpha-fair share of the progress for each task.

    The direction :math:`d` within a ball that maximises
    :math:`\sum_i p_i \langle g_i, d \rangle^{1 - \alpha} / (1 - \alpha)`. It is the
    combination with weights

    .. math::

      d = \sum_i a_i g_i, \quad
      \langle g_i, d \rangle = p_i \, a_i^{-1 / \alpha}, \quad a > 0.

    ``alpha=0`` is the average of the gradients, 1 proportional fairness, which is
    :func:`~optax_mtl.nash_mtl`, 2 the fairness of the smallest delay; a large
    ``alpha`` approaches the direction of :func:`~optax_mtl.mgda`.

    Args:
      alpha: exponent of fairness, from 0 to 10 or so. At least 0.
      max_norm: the update is scaled down to this norm at most; ``None`` for no limit.
        Without one, for ``alpha > 1``, larger gradients make smaller updates. Positive.
      preference: weights of the tasks, shape ``(T,)`` or a dict by name; by default 1
        for each task. A task with 0 takes no part.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a negative ``alpha``, for a ``max_norm`` that is not positive,
        and for a negative preference, or one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.fairgrad(max_norm=None)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.031 0.791 0.791]

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, ICML 2024

    .. note::
      Defaults are those of the authors' experiments; their class has ``alpha=1``,
      and their code multiplies by T before it limits the norm. Where there is no
      solution, because a convex combination of the gradients vanishes, the update
      is zero. :func:`~optax_mtl.pivrg` is the case of ``alpha=2`` and a preference
      that follows scores on validation data.
    """
    arguments.check_range("alpha", alpha, "[0, inf)")
    arguments.check_range("max_norm", max_norm, "(0, inf]", optional=True)
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        shares = arguments.preference_among_present(preference, gram)
        return fairgrad_weights(gram, shares, alpha, max_norm)

    return base.from_gram(weights_fn)


def fairgrad_weights(
    gram: jax.Array,
    preference: jax.Array,
    alpha: jax.typing.ArrayLike = 2.0,
    max_norm: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Weights of :func:`fairgrad`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: weights of the tasks, shape ``(T,)``, 0 for tasks that are absent.
      alpha: exponent of fairness, from 0 to 10 or so.
      max_norm: largest norm of the combination; ``None`` for no limit.

    Returns:
      Array of shape ``(T,)``.
    """
    alpha = jnp.asarray(alpha, gram.dtype)
    exponent = jnp.where(alpha > 0, alpha, 1)
    fair = solvers.fairness(gram, exponent, preference)
    # The sum of the equations times a: the squared norm without cancellation.
    active = fair > 0
    terms = jnp.where(active, fair, 1) ** (1 - 1 / exponent)
    fair_norm = jnp.sqrt(jnp.sum(jnp.where(active, preference * terms, 0)))
    # Gradients that cancel to the precision of the Gram matrix have no solution.
    sizes = fair @ jnp.sqrt(jnp.diagonal(gram))
    solved = fair_norm > jnp.sqrt(4 * len(gram) * jnp.finfo(gram.dtype).eps) * sizes
    fair = jnp.where(solved, fair, 0)

    average = preference / jnp.where(preference.any(), preference.sum(), 1)
    average_norm = jnp.sqrt(jnp.maximum(average @ gram @ average, 0))
    weights = jnp.where(alpha > 0, fair, average)
    if max_norm is None:
        return weights
    norm = jnp.where(alpha > 0, fair_norm, average_norm)
    return weights * jnp.where(
        norm > max_norm, max_norm / jnp.maximum(norm, max_norm), 1
    )
