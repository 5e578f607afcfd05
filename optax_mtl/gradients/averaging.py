"""Gradients of several tasks, averaged over those of their parts that have any."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def calls_of_each_task(count: int, num_tasks: int, name: str) -> int:
    if count % num_tasks:
        below = count - count % num_tasks
        near = f"{below} or {below + num_tasks}" if below else str(num_tasks)
        raise ValueError(
            f"{name}={count} does not divide into {num_tasks} tasks, one to each"
            f" micro-batch: every task needs as many as the others; use {near}"
        )
    return count // num_tasks


class Average(NamedTuple):
    """Gradients averaged so far."""

    shared: Any  # Those of the shared parameters, leaves `(T, *p)`.
    counts: jax.Array  # What each task's is an average of, shape `(T,)`.
    heads: Any  # Those of the others, sums over the tasks.
    head_counts: Any  # Of each head, `(T,)` where tasks come one by one, else `(1,)`.


def no_counts(params: Any, size: int) -> Any:
    """No labels for each head; varying over devices as it does."""
    count = lambda p: jnp.broadcast_to(jnp.zeros_like(p, float).sum(), (size,))
    return jax.tree.map(count, params)


def rates_of(
    count: jax.Array, weight: jax.Array, step: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """What to multiply the average so far and the next value by; the next count.

    What was absent in all steps so far is averaged over all of them: it is zero, or
    the gradient of a loss that is exactly zero wherever it is.
    """
    total = count + weight
    share = weight / jnp.where(total > 0, total, 1)
    new = jnp.where(total > 0, share, 1 / (step + 1).astype(count.dtype))
    return (1 - new, new), total.astype(count.dtype)


def blend(total: jax.Array, value: jax.Array, rates: Any) -> jax.Array:
    old, new = rates
    return (old * total + new * value).astype(total.dtype)


def add_leaf(total: jax.Array, grad: jax.Array, rates: Any) -> jax.Array:
    """Adds what one micro-batch contributes, in full precision."""
    if total.shape != jnp.shape(grad):
        raise ValueError(
            f"expected updates of shape {total.shape}, got {jnp.shape(grad)}"
        )
    return blend(total, grad, rates)


def add_at(totals: Any, task: jax.Array, grads: Any, rates: Any) -> Any:
    """The same for the gradient of one task."""

    def add(total, grad):
        row = jax.lax.dynamic_index_in_dim(total, task, keepdims=False)
        row = add_leaf(row, grad, rates)
        return jax.lax.dynamic_update_index_in_dim(total, row, task, 0)

    return jax.tree.map(add, totals, grads)


def add_heads(
    average: Average,
    grads: Any,
    task: jax.typing.ArrayLike,
    counting: bool,
    weight: jax.typing.ArrayLike = 1.0,
) -> Average:
    """The same for the heads, each averaged over where it has a gradient.

    Args:
      average: that of the shared parameters is handed on.
      grads: gradients of the heads.
      task: whose they are, if they come one by one.
      counting: whether to count where a head has a gradient; the weights are shares of
        a known total otherwise.
      weight: number of labels, or share.
    """
    if not counting:
        share = lambda total, grad: add_leaf(total, grad, (1.0, weight))
        return average._replace(heads=jax.tree.map(share, average.heads, grads))

    def count_in(counts, grad):
        return counts.at[task].add(jnp.where(jnp.any(grad != 0), weight, 0))

    def add(total, grad, old, new):
        # The sum over the tasks seen, each with as many labels as the others.
        per_task = lambda counts: counts.sum() / jnp.maximum((counts > 0).sum(), 1)
        before, after = per_task(old), per_task(new)
        after = jnp.where(after > 0, after, 1)
        weight_here = new.sum() - old.sum()
        return add_leaf(total, grad, (before / after, weight_here / after))

    counts = jax.tree.map(count_in, average.head_counts, grads)
    heads = jax.tree.map(add, average.heads, grads, average.head_counts, counts)
    return average._replace(heads=heads, head_counts=counts)
