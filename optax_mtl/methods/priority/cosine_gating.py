"""Auxiliary losses gated by the cosine between their gradient and the primary one."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, names, tasks


@names.by_name(of_tasks=["primary"])
def cosine_gating(
    primary: names.Task = 0, *, weighted: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Follows auxiliary tasks as far as they agree with the primary one.

    .. math::

      d = g_p + \sum_{i \ne p} \max(0, \cos(g_i, g_p)) \, g_i

    Args:
      primary: number or name of the primary task, :math:`p`.
      weighted: whether to weigh by the cosine, as in the formula. Otherwise
        gradients with a cosine of at least 0 count in full, and others not at all.

    Returns:
      A gradient transformation that aggregates stacked updates. The update never
      conflicts with the primary gradient. It is zero where that is zero: this is
      why the method converges to stationary points of the primary loss.

    Raises:
      ValueError: at the first update, for a task that does not exist.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[2.0, 0], [3, 4], [-1, 1]])
      >>> method = optax_mtl.cosine_gating()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [3.8 2.4]

    References:
      Du et al, `Adapting Auxiliary Losses Using Gradient Similarity
      <https://arxiv.org/abs/1812.02224>`_, 2018
    """
    main = arguments.check_primary(primary)
    arguments.check_choice("weighted", weighted, (True, False))
    return base.from_gram(lambda gram: cosine_gating_weights(gram, main, weighted))


def cosine_gating_weights(
    gram: jax.Array, primary: int = 0, weighted: bool = True
) -> jax.Array:
    """Weights of :func:`cosine_gating`, from the Gram matrix, shape ``(T, T)``."""
    arguments.check_primary(primary, len(gram))
    cosines = measures.cosine_similarity(gram)[primary]
    gates = jnp.maximum(cosines, 0) if weighted else (cosines >= 0).astype(gram.dtype)
    gates = gates.at[primary].set(1)
    return jnp.where(tasks.present(gram)[primary], gates, 0)
