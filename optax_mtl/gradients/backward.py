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
MAX_EQUATIONS = 3000
# Named losses, up to so many, of which those that are not finite are left out.
MAX_APART = 8
# So many gradients of all tasks are kept by mode="auto", to save a backward pass.
MAX_KEPT_TASKS, MAX_KEPT_BYTES = 6, 2**28


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
    check_losses_floating(losses)
    if hasattr(losses, "shape"):
        return vector
    return [x.astype(vector.dtype) for x in map(jnp.asarray, jax.tree.leaves(losses))]


def check_losses_floating(losses: Any) -> None:
    """Refuses losses that have no gradient; a Python number is a constant.

    Raises:
      TypeError: for one.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(losses):
        is_array = hasattr(x, "dtype") and not getattr(x, "weak_type", False)
        if is_array and not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"losses{jax.tree_util.keystr(path)} has dtype {x.dtype}, and so no"
                " gradient; return what is not to be minimised, such as numbers of"
                " hits, as auxiliary data by has_aux=True"
            )


def basis_of(losses):
    """Cotangents of each loss, stacked: an array or a list of arrays, ``(T, T)``."""
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


def are_few(num_tasks: int, params: Any) -> bool:
    """Whether all gradients together are kept rather than pulled back once more."""
    size = num_tasks * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return num_tasks <= MAX_KEPT_TASKS and size <= MAX_KEPT_BYTES


def pull_back_one(push_forward, primals, task, cotangent):
    """Gradient of one of a list of losses, times a number."""
    # Transposed by itself, so that only the head of this task is traversed.
    one = lambda *tangents: push_forward(*tangents)[task]
    return jax.linear_transpose(one, *primals)(cotangent)


def pull_back_in_turn(push_forward, primals, losses):
    """A function of the number of a loss and its cotangent to the gradients.

    For a loop over the losses, one at a time. Out of a list of up to MAX_APART each is
    pulled back by itself, so that what is not finite in one stays in its gradient.

    Args:
      push_forward: linear function of tangents like the primals.
      primals: what the gradients are taken of.
      losses: an array of shape ``(T,)`` or a list of scalars.

    Returns:
      A function of a number and a row of :func:`basis_of`, or a multiple of it.
    """
    if not isinstance(losses, list) or len(losses) > MAX_APART:
        pull_back = jax.linear_transpose(push_forward, *primals)
        return lambda task, cotangent: pull_back(cotangent)

    def pull_back_from(task, cotangent):
        branch = lambda i: lambda: pull_back_one(push_forward, primals, i, cotangent[i])
        return jax.lax.switch(task, [branch(i) for i in range(len(losses))])

    return pull_back_from


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
