"""MMPareto."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers, tasks
from optax_mtl.methods.conflict.mgda import mgda_weights


def mmpareto(
    gamma: jax.typing.ArrayLike = 1.5,
) -> optax.GradientTransformationExtraArgs:
    r"""MMPareto: the sum of the gradients, or their common descent at its length.

    .. math::

      d = \gamma \max\left(1, \frac{\|\sum_i g_i\|}{\|h\|}\right) h, \quad
      h = T \sum_i w_i g_i,

    where :math:`w_i = 1 / T` if no two gradients conflict, and otherwise the weights of
    the shortest gradient in the hull of all (:func:`~optax_mtl.mgda`), which is made as
    long as the sum: short updates generalise badly.

    Args:
      gamma: :math:`\gamma`, how much longer the update is. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates. Where the hull of the
      gradients contains the origin, the update is zero.

    Raises:
      ValueError: for a negative ``gamma``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.mmpareto()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update[1:], precision=3))
      [3.674 3.674]

    References:
      Wei and Hu, `MMPareto: Boosting Multimodal Learning with Innocent Unimodal
      Assistance <https://arxiv.org/abs/2405.17730>`_, ICML 2024

    .. note::
      The authors have two tasks for each modality, a multimodal and a unimodal loss,
      and take the ratio of norms for each tensor: :func:`~optax_mtl.per_group` does so.
    """
    arguments.check_range("gamma", gamma, "[0, inf)")
    return base.from_gram(lambda gram: mmpareto_weights(gram, gamma))


def mmpareto_weights(gram: jax.Array, gamma: jax.typing.ArrayLike = 1.5) -> jax.Array:
    """Weights of :func:`mmpareto`, from the Gram matrix of the task gradients."""
    gram, _ = solvers.normalize_gram(gram)
    exists = tasks.present(gram).astype(gram.dtype)
    hull = mgda_weights(gram)
    weights = jnp.where(jnp.all(gram >= 0), exists, exists.sum() * hull)
    # Of a vanishing combination rounding errors would be made as long as the sum.
    norm2, noise = solvers.combined_norm2(gram, weights)
    found = norm2 > len(gram) / 4 * noise
    sum2, _ = solvers.combined_norm2(gram, exists)
    ratio = jnp.sqrt(sum2 / jnp.where(found, norm2, 1))
    return jnp.where(found, gamma * jnp.maximum(1, ratio) * weights, 0)
