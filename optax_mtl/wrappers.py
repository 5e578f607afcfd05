"""Transformations around a method or around a whole chain."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import tasks


def per_task(
    tx: optax.GradientTransformation, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    r"""Applies an Optax transformation to the gradient of each task on its own.

    .. math::

      g_i \leftarrow \operatorname{tx}_i(g_i), \quad i = 1, \ldots, T

    Use it in front of a method, where a bare Optax transformation would see one
    array with a task axis: ``optax.clip_by_global_norm`` would take one norm
    over all tasks, and ``optax.ema`` would change the shape of its state.

    Args:
      tx: any gradient transformation on the parameters.
      num_tasks: number of tasks, T; there is one state for each.

    Returns:
      A gradient transformation from stacked updates to stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> clip = optax_mtl.per_task(optax.clip_by_global_norm(1.0), num_tasks=2)
      >>> params, updates = jnp.zeros(2), jnp.array([[3.0, 4], [0, 0.5]])
      >>> update, _ = clip.update(updates, clip.init(params), params)
      >>> print(jnp.array_str(update, precision=2))
      [[0.6 0.8]
       [0.  0.5]]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        # Broadcasting the parameters as well would cost T copies of them.
        return jax.vmap(lambda _: tx.init(params))(jnp.arange(num_tasks))

    def update(updates, state, params=None, **extra_args):
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        update_one = lambda g, s: tx.update(g, s, params, **extra_args)
        return jax.vmap(update_one)(updates, state)

    return optax.GradientTransformationExtraArgs(init, update)
