"""Dynamic barrier gradient descent."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks


@names.by_name(of_tasks=["primary"])
def dynamic_barrier(
    beta: jax.typing.ArrayLike = 1.0, *, primary: names.Task = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic barrier gradient descent: secondary losses among the primary optima.

    Follows the gradient :math:`a` of all secondary losses, and adds as much of the
    primary gradient :math:`g_p` as its loss needs in order to fall:

    .. math::

      d = a + \max\left(\beta - \frac{\langle a, g_p \rangle}{\|g_p\|^2}, 0\right) g_p,
      \qquad a = \sum_{i \ne p} g_i.

    This is the direction closest to :math:`a` with
    :math:`\langle d, g_p \rangle \ge \beta \|g_p\|^2`.

    Args:
      beta: progress of the primary loss, relative to that of its own gradient; above 0.
        At least 0.
      primary: number or name of the primary task, :math:`p`.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: at the first update, for a task that does not exist.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[2.0, 0], [-1, 1]])
      >>> method = optax_mtl.dynamic_barrier()
      >>> print(method.update(updates, method.init(jnp.zeros(2)))[0])
      [2. 1.]

    References:
      Gong et al, `Automatic and Harmless Regularization with Constrained and
      Lexicographic Optimization: A Dynamic Barrier Approach
      <https://openreview.net/forum?id=817F5yuNAf1>`_, NeurIPS 2021

    .. note::
      This is the paper's lexicographic case. Its constrained case also bounds the
      progress by the distance of the primary loss from a threshold.
    """
    arguments.check_range("beta", beta, "[0, inf)")
    main = arguments.check_primary(primary)
    return base.from_gram(lambda gram: dynamic_barrier_weights(gram, beta, main))


def dynamic_barrier_weights(
    gram: jax.Array, beta: jax.typing.ArrayLike = 1.0, primary: int = 0
) -> jax.Array:
    """Weights of :func:`dynamic_barrier`, from the Gram matrix, shape ``(T, T)``."""
    arguments.check_primary(primary, len(gram))
    main = jnp.arange(len(gram)) == primary
    squared = gram[primary, primary]
    dot = jnp.sum(jnp.where(main, 0, gram[primary]))
    exists = tasks.present(gram)[primary]
    ratio = jnp.where(exists, dot / jnp.where(exists, squared, 1), 0)
    return jnp.where(main, jnp.maximum(beta - ratio, 0), 1)
