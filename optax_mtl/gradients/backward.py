"""What every way of getting gradients shares: losses in, cotangents back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import tasks
from optax_mtl.gradients.sharing import merge

# Equations of the backward passes that are written out one beside the other, for the
# sake of compile time; beyond, several tasks share a pass.
MAX_EQUATIONS = 6000
# Named losses, up to so many, of which those that are not finite are left out.
MAX_APART = 8


def vector_fn(losses_fn, has_aux, args, kwargs):
    """Function of shared parameters and heads to losses and what to return."""

    def losses_of(shared_part, heads):
        value = losses_fn(merge(shared_part, heads), *args, **kwargs)
        losses, _ = take_aux(value, has_aux)
        return separate_losses(losses), value

    return losses_of


def separate_losses(losses: Any) -> jax.Array | list[jax.Array]:
    """A list of named losses, or a vector."""
    vector = stack_task_losses(losses)
    if hasattr(losses, "shape"):
        return vector
    return [x.astype(vector.dtype) for x in map(jnp.asarray, jax.tree.leaves(losses))]


def basis_of(losses):
    """Cotangents of each loss, stacked, in the structure of the losses."""
    # Unlike jnp.eye, this varies over devices under shard_map as the losses do.
    basis = jnp.diag(jnp.ones_like(tasks.stack_losses(losses, None)))
    return list(basis) if isinstance(losses, list) else basis


def pull_back_each(push_forward, primals, losses):
    """Stacked gradients of all losses with respect to all arguments."""
    if not isinstance(losses, list):
        pull_back = jax.linear_transpose(push_forward, *primals)
        return jax.vmap(pull_back)(basis_of(losses))
    # Tasks that share a pass run through the heads of all of them, and convolutions
    # of several at once are slow: as few as the compiler can bear.
    cotangent = jnp.ones_like(losses[0])
    one = lambda x: pull_back_one(push_forward, primals, 0, x)
    equations = _count_equations(jax.make_jaxpr(one)(cotangent))
    num_passes = min(len(losses), max(MAX_EQUATIONS // equations, 1))
    blocks = np.array_split(np.arange(len(losses)), num_passes)
    blocks = [_pull_back_block(push_forward, primals, losses, x) for x in blocks]
    return jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *blocks)


def _pull_back_block(push_forward, primals, losses, block):
    """Stacked gradients of some of a list of losses, in one pass."""
    first, last = block[0], block[-1]
    if first == last:
        gradient = pull_back_one(
            push_forward, primals, first, jnp.ones_like(losses[first])
        )
        return jax.tree.map(lambda x: x[None], gradient)
    some = lambda *tangents: push_forward(*tangents)[first : last + 1]
    pull_back = jax.linear_transpose(some, *primals)
    return jax.vmap(pull_back)(basis_of(losses[first : last + 1]))


def _count_equations(jaxpr):
    """Equations of a program, those of its parts included."""
    if not hasattr(jaxpr, "eqns"):
        return 0
    parts = [jax.tree.leaves(list(eqn.params.values())) for eqn in jaxpr.eqns]
    return len(parts) + sum(_count_equations(x) for part in parts for x in part)


def pull_back_one(push_forward, primals, task, cotangent):
    """Gradient of one of a list of losses, times a number."""
    # Transposed by itself, so that only the head of this task is traversed.
    one = lambda *tangents: push_forward(*tangents)[task]
    return jax.linear_transpose(one, *primals)(cotangent)


def pull_back_some(push_forward, primals, weights, keep):
    """Weighted sum of the gradients of some of a list of losses."""
    total = optax.tree.zeros_like(primals)
    for task, weight in enumerate(weights):
        gradient = pull_back_one(push_forward, primals, task, weight)
        add = lambda t, g, task=task: t + jnp.where(keep[task], g, 0)
        total = jax.tree.map(add, total, gradient)
    return total


def take_aux(value: Any, has_aux: bool, name: str = "losses_fn") -> tuple[Any, Any]:
    """What a function returned and its auxiliary data, ``None`` without ``has_aux``.

    Raises:
      TypeError: with ``has_aux``, if it returned something else than a pair.
    """
    if not has_aux:
        return value, None
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"with has_aux=True, {name} should return a pair, what is differentiated"
            " and auxiliary data, but it returned shapes"
            f" {jax.tree.map(np.shape, value)}; leave has_aux out, or return both"
        )
    return value


def stack_task_losses(losses: Any) -> jax.Array:
    """The losses that ``losses_fn`` returned, as one vector of shape ``(T,)``.

    Raises:
      ValueError: if they are neither a vector nor a tree of scalars, or a pair with
        auxiliary data.
    """
    if isinstance(losses, tuple) and any(not _is_scalar(x) for x in losses):
        raise ValueError(
            "losses_fn should return one loss for each task, but returned a tuple of"
            f" shapes {jax.tree.map(np.shape, losses)}; if losses come first and"
            " auxiliary data second, say has_aux=True"
        )
    leaves = jax.tree.leaves(losses)
    is_array = hasattr(losses, "shape")
    if not leaves or any(jnp.ndim(x) != is_array for x in leaves):
        raise ValueError(
            "losses_fn should return one loss for each task, as a vector of shape"
            " (T,) or a dict of scalars, but returned shapes"
            f" {jax.tree.map(jnp.shape, losses)}; do not sum the losses, and average"
            " each over its batch"
        )
    return tasks.stack_losses(losses, None)


def _is_scalar(x: Any) -> bool:
    return jax.tree_util.all_leaves([x]) and jnp.ndim(x) == 0
