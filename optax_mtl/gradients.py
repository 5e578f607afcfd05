"""Ways to get the gradients of several tasks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Mask = Any  # Tree of bools with the structure of the parameters, or a prefix of it.


def value_and_task_grads(
    losses_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    shared: Mask | Callable[[optax.Params], Mask] | None = None,
    sequential: bool = False,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Makes a function that returns the losses and the gradient of each task.

    .. math::

      g_i = \nabla_\theta L_i(\theta), \quad i = 1, \ldots, T

    One forward pass serves all tasks; each adds a backward pass.

    Args:
      losses_fn: maps the parameters and further arguments to the losses: a vector
        of shape ``(T,)`` or a dict of named scalars (tasks in the order of the
        sorted names).
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      shared: which parameters all tasks share, a mask as in :func:`optax.masked`.
        The other parameters (heads) get the ordinary gradient of the sum of the
        losses, not stacked, so that they cost nothing more. ``None``: all.
      sequential: whether to run the backward passes one after the other, with
        memory for one at a time, instead of batched.

    Returns:
      A function of the parameters and further arguments that returns
      ``(losses, updates)``, or ``((losses, aux), updates)``; every leaf of the
      updates has one leading task axis, those of heads excepted.

    Raises:
      ValueError: at the call, if the losses are neither a vector nor scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda x: {"a": (x**2).sum(), "b": x.sum()}
      >>> losses, updates = optax_mtl.value_and_task_grads(losses_fn)(jnp.ones(2))
      >>> print(updates)
      [[2. 2.]
       [1. 1.]]
    """

    def fn(params, *args, **kwargs):
        def vector_fn(params):
            out = losses_fn(params, *args, **kwargs)
            losses, aux = out if has_aux else (out, None)
            return stack_task_losses(losses), (losses, aux)

        stacked, head = _split(params, shared)
        merge = lambda stacked, head: jax.tree.map(
            lambda s, h: h if s is None else s, stacked, head, is_leaf=_is_none
        )
        vector, pull_back, (losses, aux) = jax.vjp(
            lambda stacked, head: vector_fn(merge(stacked, head)),
            stacked,
            head,
            has_aux=True,
        )
        pull_back_shared = lambda cotangent: pull_back(cotangent)[0]
        # Unlike jnp.eye, this varies over devices under shard_map as the losses do.
        basis = jnp.diag(jnp.ones_like(vector))
        if sequential:
            updates = jax.lax.map(pull_back_shared, basis)
        else:
            updates = jax.vmap(pull_back_shared)(basis)
        if shared is not None:
            updates = merge(updates, pull_back(jnp.ones_like(vector))[1])
        return ((losses, aux) if has_aux else losses), updates

    return fn


def stack_task_losses(losses: Any) -> jax.Array:
    """The losses of the tasks as one vector of shape ``(T,)``.

    Raises:
      ValueError: if they are neither a vector nor a tree of scalars.
    """
    leaves = jax.tree.leaves(losses)
    if len(leaves) == 1 and jnp.ndim(leaves[0]) == 1:
        return leaves[0]
    if not leaves or any(jnp.ndim(x) for x in leaves) or hasattr(losses, "shape"):
        raise ValueError(
            "losses_fn should return one loss for each task, as a vector of shape"
            " (T,) or a dict of scalars, but returned shapes"
            f" {jax.tree.map(jnp.shape, losses)}; do not sum the losses, and average"
            " each over its batch"
        )
    return jnp.stack(leaves)


def _split(params: optax.Params, shared: Any) -> tuple[Any, Any]:
    """Separates the shared parameters from the others; None stands for a hole."""
    if shared is None:
        return params, jax.tree.map(lambda _: None, params)
    mask = shared(params) if callable(shared) else shared
    mask = jax.tree.broadcast(mask, params)
    pick = lambda keep: jax.tree.map(
        lambda p, m: p if m is keep else None, params, mask
    )
    return pick(True), pick(False)


def _is_none(x: Any) -> bool:
    return x is None
