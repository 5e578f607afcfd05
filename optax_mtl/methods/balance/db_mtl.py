"""Dual balancing of losses and gradients."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, averages, base, names, tasks
from optax_mtl.methods.balance.inverse_norm import inverse_norm_weights


@names.by_name("min_losses")
def db_mtl(
    num_tasks: int,
    *,
    beta: jax.typing.ArrayLike = 0.9,
    sigma: jax.typing.ArrayLike = 0.0,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Dual balancing (DB-MTL), of the scales of losses and of gradients.

    Averages the gradients of the logarithms of the losses over the steps, and
    scales all averages to the norm of the largest:

    .. math::

      Y_i \leftarrow \beta_k Y_i + (1 - \beta_k) \frac{g_i}{L_i - b_i}, \quad
      \beta_k = \frac{\beta}{k^\sigma}, \quad
      d = \sum_i \frac{\max_j \|Y_j\|}{\|Y_i\|} Y_i

    Args:
      num_tasks: number of tasks, T.
      beta: decay of the averages. With ``beta=0`` there are none in the state, and the
        method reads only the Gram matrix and the losses. In [0, 1).
      sigma: how fast the decay vanishes with the number of steps k of the task. At
        least 0.
      min_losses: :math:`b`, lower bounds of the losses, one number, shape ``(T,)`` or a
        dict by name. Below its bound a loss has no logarithm, and the update is NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates, losses = jnp.array([[2.0, 0], [0, 3]]), jnp.array([2.0, 1.0])
      >>> method = optax_mtl.db_mtl(num_tasks=2, beta=0.0)
      >>> state = method.init(jnp.zeros(2))
      >>> print(method.update(updates, state, losses=losses)[0])
      [3. 3.]

    References:
      Lin et al, `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023

    .. note::
      As in the authors' code, the averages start at zero and are not corrected for
      it: the first update is the fraction ``1 - beta`` of its full length.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("beta", beta, "[0, 1)")
    arguments.check_range("sigma", sigma, "[0, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    if isinstance(beta, (int, float)) and beta == 0:

        def weights_fn(state, gram, losses):
            inverse = base.reciprocal(losses)
            log_gram = gram * jnp.outer(inverse, inverse)
            return inverse_norm_weights(log_gram, "max") * inverse, state

        return base.from_state(
            optax.EmptyState,
            weights_fn,
            num_tasks,
            reads=["gram", "losses"],
            min_losses=min_losses,
        )

    def scale(squares, losses):
        del squares
        losses = tasks.stack_losses(losses, num_tasks)
        return base.reciprocal(base.losses_above(losses, min_losses))

    return averages.from_averages(
        optax.EmptyState,
        lambda state, gram: (inverse_norm_weights(gram, "max"), state),
        num_tasks,
        decay=lambda count: beta / count**sigma,
        scale=scale,
    )
