"""Projecting conflicting gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, tasks


class PCGradState(NamedTuple):
    """State of :func:`pcgrad`."""

    key: jax.Array  # Data of the key for the orders of projection.


def pcgrad(
    key: int | jax.Array = 0,
    *,
    order: str = "random",
    unprojected: jax.typing.ArrayLike | None = None,
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
      order: ``"random"``, drawn anew for each task and step, as in the paper;
        ``"fixed"``, the order of the tasks, as in the authors' first code; or
        ``"losses"``, from the smallest loss to the largest, as in FedFV, so that the
        last projections, which hold, are those on the gradients of large losses.
      unprojected: with ``order="losses"``, the share of the tasks, rounded up, that
        have the largest losses and whose gradients stay as they are; 0.1 in FedFV's
        code. Between 0 and 1; none by default.

    Returns:
      A gradient transformation that aggregates stacked updates. With
      ``order="losses"`` it reads the extra argument ``losses``, shape ``(T,)``.

    Raises:
      ValueError: for another order, and for ``unprojected`` out of range or with an
        order that does not know the losses.

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

      Wang et al, `Federated Learning with Fair Averaging
      <https://arxiv.org/abs/2104.14937>`_ (FedFV), IJCAI 2021

    .. note::
      Several implementations average instead of summing: chain with
      :func:`optax.scale` to do so. For an order of importance see
      :func:`~optax_mtl.priority_projection`. FedFV averages, makes the update as long
      as the average gradient, and projects it once more by gradients of the last
      rounds; its code has :math:`1 + \lfloor \alpha (T - 1) \rfloor` gradients
      unprojected, which is the same for a small share.
    """
    arguments.check_key(key)
    arguments.check_choice("order", order, ("random", "fixed", "losses"))
    arguments.check_range("unprojected", unprojected, "[0, 1]", optional=True)
    if unprojected is not None and order != "losses":
        raise ValueError(
            f"unprojected={unprojected} is the share of the largest losses, which"
            f" order={order!r} does not read; take order='losses'"
        )

    def step(state, gram, losses=None):
        next_key, order_key = jax.random.split(arguments.key_of(state.key, key))
        orders = jnp.tile(jnp.arange(len(gram)), (len(gram), 1))
        if order == "random":
            orders = random_orders(order_key, len(gram))
        projected = None
        if order == "losses":
            exists = tasks.present(gram)  # The absent ones are the smallest.
            sizes = jnp.where(exists, losses, jnp.finfo(losses.dtype).min)
            ascending = jnp.argsort(sizes)
            orders = jnp.tile(ascending, (len(gram), 1))
            if unprojected is not None:
                # Not one more by a rounding error.
                number = jnp.ceil(unprojected * exists.sum() - 1e-4)
                projected = jnp.argsort(ascending) < len(gram) - number
        weights = pcgrad_weights(gram, orders, projected)
        return weights, PCGradState(arguments.key_data(next_key))

    reads = ["gram", "losses"] if order == "losses" else ["gram"]
    return base.from_state(
        lambda: PCGradState(arguments.key_data(key)), step, reads=reads
    )


def pcgrad_weights(
    gram: jax.Array, orders: jax.Array, projected: jax.Array | None = None
) -> jax.Array:
    """Weights of :func:`pcgrad`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      orders: row i lists the tasks in the order in which task i visits them,
        shape ``(T, T)``, as ``random_orders`` draws them; visiting itself
        has no effect.
      projected: tasks whose gradients are projected, shape ``(T,)``; all by default.

    Returns:
      Array of shape ``(T,)``.
    """
    task = jnp.arange(len(gram))
    norms_squared = jnp.diagonal(gram)

    def visit(coefficients, others):
        # Row i of the coefficients expresses the projected g_i in the originals.
        dots = jnp.sum(coefficients * gram[others], axis=1)
        conflict = (dots < 0) & (others != task)
        if projected is not None:
            conflict = conflict & projected
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
