"""Impartial multi-task learning, gradient balance."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, solvers, tasks


def imtl_g(*, strict_paper: bool = False) -> optax.GradientTransformationExtraArgs:
    r"""Gradient balance of impartial multi-task learning (IMTL-G).

    The combination with equal projections onto all task gradients, and weights that
    sum to 1:

    .. math::

      d = \sum_i w_i g_i, \quad
      \frac{\langle g_i, d \rangle}{\|g_i\|} = \frac{\langle g_j, d \rangle}{\|g_j\|},
      \quad \sum_i w_i = 1.

    With the Gram matrix :math:`M` and the norms :math:`n` of the gradients these are
    :math:`w = v / \sum_i v_i`, :math:`v = M^{-1} n`. Weights may be negative. The
    direction is that of :func:`~optax_mtl.config`, the length another.

    Args:
      strict_paper: whether to divide by :math:`\sum_i v_i` whatever its sign, and to
        take the pseudo-inverse of the Gram matrix where gradients are dependent.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.imtl_g()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.077 1.    1.   ]

    References:
      Liu et al, `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    .. note::
      For three tasks and more :math:`\sum_i v_i` can be negative. The update of the
      paper then *raises* the loss of every task, at equal rates. Here the weights
      are :math:`v / \sum_i |v_i|` in that case, which keeps the equal projections
      and lowers every loss. For dependent gradients, :math:`v` solves the equations
      between the unit gradients in the sense of least squares, so that the result
      does not depend on the scales of the tasks.
    """
    arguments.check_choice("strict_paper", strict_paper, (True, False))
    return base.from_gram(lambda gram: imtl_g_weights(gram, strict_paper))


def imtl_g_weights(gram: jax.Array, strict_paper: bool = False) -> jax.Array:
    """Weights of :func:`imtl_g`, from the Gram matrix of the task gradients."""
    gram, _ = solvers.normalize_gram(gram)
    norms = jnp.sqrt(jnp.diagonal(gram))
    if strict_paper:
        v = solvers.pinv_solve(gram, norms)
        return v / jnp.where(v.sum() == 0, 1, v.sum())
    exists = tasks.present(gram)
    # Cosines: a pseudo-inverse in float32 would drop gradients 1000 times shorter.
    ones = exists.astype(gram.dtype)
    v = solvers.pinv_solve(measures.cosine_similarity(gram), ones)
    # Opposite gradients: only rounding errors have a positive projection on both.
    vanishes = ones @ v <= len(gram) * jnp.finfo(gram.dtype).eps * ones.sum()
    v = jnp.where(vanishes, 0, v)
    v = jnp.where(exists, v / jnp.where(exists, norms, 1), 0)
    size = jnp.abs(v).sum()
    total = jnp.where(v.sum() > 1e-4 * size, v.sum(), size)
    return v / jnp.where(total > 0, total, 1)
