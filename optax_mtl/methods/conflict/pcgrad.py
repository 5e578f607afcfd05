"""Projecting conflicting gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base


class PCGradState(NamedTuple):
    """State of :func:`pcgrad`."""

    key: jax.Array  # Data of the key for the orders of projection.


def pcgrad(
    key: int | jax.Array = 0, *, order: str = "random"
) -> optax.GradientTransformationExtraArgs:
    r"""Projecting conflicting gradients (PCGrad), or gradient surgery.

    Visits for each task :math:`i` the other tasks in random order, projects
    :math:`g_i` onto the normal plane of each that it conflicts with, and sums:

    .. math::

      g_i^{PC} \leftarrow g_i^{PC}
      - \frac{\min(0, \langle g_i^{PC}, g_j \rangle)}{\|g_j\|^2} g_j,
      \quad d = \sum_i g_i^{PC}.

    For two tasks the result conflicts with neither; for more it may.

    Args:
      key: seed or typed random key for the orders.
      order: ``"random"``, drawn anew for each task and step, as in the paper; or
        ``"fixed"``, the order of the tasks, as in the authors' first code.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for another order.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.pcgrad()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.585 3.801 3.801]

    References:
      Yu et al, `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020

    .. note::
      Several implementations average instead of summing: chain with
      :func:`optax.scale` to do so. For an order of importance see
      :func:`~optax_mtl.priority_projection`.
    """
    arguments.check_key(key)
    arguments.check_choice("order", order, ("random", "fixed"))

    def step(state, gram):
        next_key, order_key = jax.random.split(arguments.key_of(state.key, key))
        orders = jnp.tile(jnp.arange(len(gram)), (len(gram), 1))
        if order == "random":
            orders = random_orders(order_key, len(gram))
        return pcgrad_weights(gram, orders), PCGradState(arguments.key_data(next_key))

    return base.from_state(
        lambda: PCGradState(arguments.key_data(key)), step, reads=["gram"]
    )


def pcgrad_weights(gram: jax.Array, orders: jax.Array) -> jax.Array:
    """Weights of :func:`pcgrad`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      orders: row i lists the tasks in the order in which task i visits them,
        shape ``(T, T)``, as ``random_orders`` draws them; visiting itself
        has no effect.

    Returns:
      Array of shape ``(T,)``.
    """
    task = jnp.arange(len(gram))
    norms_squared = jnp.diagonal(gram)

    def visit(coefficients, others):
        # Row i of the coefficients expresses the projected g_i in the originals.
        dots = jnp.sum(coefficients * gram[others], axis=1)
        conflict = (dots < 0) & (others != task)
        # An absent task never conflicts, so that the division is safe.
        step = jnp.where(conflict, dots / norms_squared[others], 0)
        return coefficients.at[task, others].add(-step), None

    coefficients, _ = jax.lax.scan(
        visit, jnp.eye(len(gram), dtype=gram.dtype), orders.T
    )
    return coefficients.sum(axis=0)


def random_orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """An independent random order of all tasks for each task, shape ``(T, T)``."""
    return jnp.argsort(jax.random.uniform(key, (num_tasks, num_tasks)), axis=1)
