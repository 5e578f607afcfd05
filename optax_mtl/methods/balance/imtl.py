"""Impartial multi-task learning, gradients and losses together."""

import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks
from optax_mtl.methods.balance.imtl_g import imtl_g_weights
from optax_mtl.methods.loss.imtl_l import init_balance, learn_balance


@names.by_name("min_losses")
def imtl(
    num_tasks: int,
    *,
    strict_paper: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Impartial learning by gradients and losses (IMTL), the hybrid.

    Balances the losses with weights :math:`e^{s_i}` as :func:`~optax_mtl.imtl_l`
    does, and the gradients of the balanced losses as :func:`~optax_mtl.imtl_g` does:

    .. math::

      d = \sum_i \alpha_i e^{s_i} g_i, \quad
      \left\langle d, \frac{g_i}{\|g_i\|} \right\rangle \text{ equal for all } i,
      \quad \sum_i \alpha_i = 1

    The direction is that of :func:`~optax_mtl.imtl_g`; the losses decide the length.

    Args:
      num_tasks: number of tasks, T.
      strict_paper: as in :func:`~optax_mtl.imtl_g`: whether to divide by the sum of the
        weights of the gradients whatever its sign, and to take the pseudo-inverse of
        the Gram matrix where gradients are dependent.
      optimizer: of the logarithms :math:`s` of the loss weights, which it sees one
        by one; by default ``optax.adam(0.025)``.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound there is no optimum, and the
        weights are NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates, losses = jnp.array([[2.0, 0], [0, 1]]), jnp.array([0.5, 2])
      >>> method = optax_mtl.imtl(num_tasks=2)
      >>> state = method.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.661 0.661]

    References:
      Liu et al, `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    .. note::
      Heads get their gradients multiplied by :math:`e^{s_i}` in the paper; with
      :func:`optax.partition` that is :func:`~optax_mtl.imtl_l` for the heads. For
      three tasks and more the sum of IMTL-G's weights :math:`v` can be negative. The
      update of the paper then *raises* the loss of every task, at equal rates. Here the
      weights are :math:`v / \sum_i |v_i|` in that case, which keeps the equal
      projections and lowers every loss.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_choice("strict_paper", strict_paper, (True, False))
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    optimizer = arguments.as_transformation(
        "optimizer", optax.adam(0.025) if optimizer is None else optimizer
    )

    def step(state, gram, losses):
        exists = tasks.present(gram) & (losses != 0)
        scales = jnp.where(exists, jnp.exp(state.log_weights), 0)
        balanced = gram * jnp.outer(scales, scales)
        weights = scales * imtl_g_weights(balanced, strict_paper)
        return weights, learn_balance(state, optimizer, losses, exists)

    return base.from_state(
        lambda: init_balance(num_tasks, optimizer),
        step,
        num_tasks,
        reads=["gram", "losses"],
        min_losses=min_losses,
    )
