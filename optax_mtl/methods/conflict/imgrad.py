"""Imbalance-sensitive gradient descent."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers, tasks
from optax_mtl.methods.conflict.mgda import mgda_weights


def imgrad(
    c: jax.typing.ArrayLike = 0.8, *, rescale: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Imbalance-sensitive gradient descent (IMGrad): CAGrad that sees the imbalance.

    .. math::

      d = g_0 + \frac{s}{\|g_p\|} g_p, \quad s = c \|g_0\|, \quad
      p = \arg\min_{p \in \Delta} \; (1.5 - \cos) \langle g_p, g_0 \rangle
      + s \cos \, \|g_p\|,

    where :math:`g_p = \sum_i p_i g_i` and :math:`\cos` is that of the angle between the
    average gradient :math:`g_0` and the shortest gradient in the hull of all: the more
    the gradients are out of balance, the more counts the progress along the average.

    Args:
      c: radius around the average gradient, relative to its norm. At least 0.
      rescale: whether to divide the update by :math:`1 + c^2`, as the authors' code.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a negative ``c``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]])
      >>> method = optax_mtl.imgrad()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(4)))
      >>> print(jnp.array_str(update, precision=3))
      [-0.038  1.039  1.189  0.075]

    References:
      Zhou et al, `Injecting Imbalance Sensitivity for Multi-Task Learning
      <https://arxiv.org/abs/2503.08006>`_, IJCAI 2025

    .. note::
      The authors' code further multiplies by T, to match the sum of the losses. Where
      the hull of the gradients contains the origin, no angle is defined; the update
      is that of :func:`~optax_mtl.cagrad` there: nothing for ``c >= 1``, and else the
      average.
    """
    arguments.check_range("c", c, "[0, inf)")
    arguments.check_choice("rescale", rescale, (True, False))

    def weights_fn(gram):
        weights = imgrad_weights(gram, c)
        return weights / (1 + c**2) if rescale else weights

    return base.from_gram(weights_fn)


def imgrad_weights(gram: jax.Array, c: jax.typing.ArrayLike = 0.8) -> jax.Array:
    """Weights of :func:`imgrad` without the rescaling, from the Gram matrix."""
    gram, _ = solvers.normalize_gram(gram)
    exists = tasks.present(gram)
    average = arguments.preference_among_present(None, gram, default_total=1.0)
    hull = mgda_weights(gram)
    shortest2, noise = solvers.combined_norm2(gram, hull)
    nothing = shortest2 <= len(gram) / 4 * noise
    average2, _ = solvers.combined_norm2(gram, average)
    lengths = jnp.sqrt(jnp.where(nothing, 1, average2 * shortest2))
    cosine = jnp.clip(average @ gram @ hull / lengths, 0, 1)
    radius = c * jnp.sqrt(average2)
    p = solvers.simplex_cone_program(
        gram, (1.5 - cosine) * (gram @ average), cosine * radius, exists
    )
    p2, _ = solvers.combined_norm2(gram, p)
    weights = average + radius / jnp.sqrt(jnp.where(nothing, 1, p2)) * p
    return jnp.where(nothing, jnp.where(jnp.less(c, 1), average, 0), weights)
