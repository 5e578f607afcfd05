"""Transformations in front of a method, from stacked updates to stacked updates."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks
from optax_mtl.wrappers import weigh


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

    .. note::
      A task whose gradient is exactly zero is absent: its update is zero and its
      state stays as it was, so that the running averages of a task do not decay
      where its labels are missing. Where a gradient is not finite or too large to
      be squared, the updates of a transformation that has a state are NaN, and the
      state stays.
    """
    arguments.check_count("num_tasks", num_tasks)
    tx = arguments.as_transformation("tx", tx)

    def init(params):
        # A weakly typed scalar parameter would make a state of another type.
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.result_type(p)), params)
        # Broadcasting the parameters as well would cost T copies of them.
        return jax.vmap(lambda _: tx.init(params))(jnp.arange(num_tasks))

    def update(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, params, num_tasks, reader="per_task")
        if count is None:
            return updates, state
        out, new_state = base.update_tasks(tx, updates, state, params, **extra_args)
        if jax.tree.leaves(state):
            # Squares fit, and with them what running averages of them become.
            finite = base.all_finite(tasks.squared_norms(updates))
            out = jax.tree.map(lambda u: jnp.where(finite, u, jnp.nan), out)
            new_state = base.keep_if(finite, new_state, state)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def reweigh(
    method: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the gradients of the tasks as a method does, for another to resolve.

    .. math::

      g_i \leftarrow w_i g_i

    with the weights :math:`w` of the method. So balance and conflict are two links of a
    chain: any method that reads losses in front of any that reads gradients.

    Args:
      method: any method that makes its weights from losses or inner products; not from
        the gradients themselves.

    Returns:
      A gradient transformation from stacked updates to stacked updates. The method gets
      the extra arguments, such as ``losses``, and so does what follows in the chain: a
      second method that reads losses reads them as they were.

    Raises:
      TypeError: at the update, for a method that reads the gradients themselves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> tx = optax.chain(
      ...   optax_mtl.reweigh(optax_mtl.uncertainty_weighting(3)),
      ...   optax_mtl.cagrad(),
      ...   optax.adamw(1e-3),
      ... )
      >>> balanced = optax.chain(
      ...   optax_mtl.reweigh(optax_mtl.gls()), optax_mtl.mgda()
      ... )
      >>> updates, losses = jnp.array([[8.0, 0], [0, 2]]), jnp.array([4.0, 1])
      >>> state = balanced.init(jnp.zeros(2))
      >>> print(balanced.update(updates, state, losses=losses)[0])  # Of 2 g and g / 2.
      [1. 1.]

    .. note::
      Whether the weighted gradients are finite decides if the state of the method is
      kept, so that they are measured in every step if it has one: in front of a method
      that reads losses alone this costs T backward passes.
    """
    method = arguments.as_transformation("method", method)

    def update(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, gram_suffices=True)
        if count is None:
            return updates, state
        has_state = bool(jax.tree.leaves(state))
        if has_state and isinstance(updates, tasks.GramView):
            updates = updates.measured()
        weights, _, new_state = weigh(
            "reweigh", method, count, updates, state, params, **extra_args
        )
        out = tasks.scale_tasks(weights, updates)
        if has_state:
            finite = base.all_finite((weights, tasks.squared_norms(out)))
            new_state = base.keep_if(finite, new_state, state)
        return out, new_state

    return optax.GradientTransformationExtraArgs(method.init, update)


@names.by_name("min_losses")
def log_losses(
    *, min_losses: names.PerTask = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Turns the gradients of the losses into those of their logarithms.

    .. math::

      g_i \leftarrow \nabla \log (L_i - b_i) = \frac{g_i}{L_i - b_i}

    In front of a method, this makes it indifferent to the units of the losses.

    Args:
      min_losses: :math:`b`, lower bounds of the losses, one number, shape ``(T,)`` or a
        dict by name. Below its bound a loss has no logarithm, and its gradient becomes
        NaN.

    Returns:
      A gradient transformation from stacked updates to stacked updates that reads
      the extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> method = optax.chain(optax_mtl.log_losses(), optax_mtl.linear())
      >>> updates, losses = jnp.array([[4.0, 2], [3, 3]]), jnp.array([2.0, 1])
      >>> state = method.init(jnp.zeros(2))
      >>> print(method.update(updates, state, losses=losses)[0])
      [5. 4.]
    """
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")

    return reweigh(base.from_losses(base.reciprocal, min_losses=min_losses))
