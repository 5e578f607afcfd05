"""Along the task axis, in each coordinate: sums, and entries in ascending order.

On a CPU, XLA reduces a leading axis twenty times slower than it adds its slices, and
sorts along one a hundred times slower than it compares and exchanges them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optax_mtl import tasks

# More tasks would be more operations than are worth their compilation.
_MAX_SLICES = 32


def reduce(ufunc: Any, of_task: Callable[..., jax.Array], *stacked: Any) -> jax.Array:
    """Reduces what is computed for each task over the tasks, in one pass.

    Args:
      ufunc: such as ``jnp.add`` or ``jnp.maximum``.
      of_task: maps what the arrays hold for a task to an array of shape ``p``.
      *stacked: arrays with a leading task axis, such as ``(T, *p)`` or ``(T,)``.

    Returns:
      Array of shape ``p``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_mtl import coordinates
      >>> updates, weights = jnp.array([[-4.0, 1, 1], [6, 1, 1]]), jnp.array([0.5, 1])
      >>> print(coordinates.reduce(jnp.add, jnp.multiply, weights, updates))
      [4.  1.5 1.5]
    """
    if not all(map(tasks.on_one_cpu, stacked)):  # Slices along shards would be moved.
        return ufunc.reduce(jax.vmap(of_task)(*stacked), axis=0)
    if len(stacked[0]) <= _MAX_SLICES:
        return functools.reduce(ufunc, map(of_task, *map(list, stacked)))
    x = jax.vmap(of_task)(*stacked)
    while len(x) > 1:
        half = len(x) // 2
        folded = ufunc(x[:half], x[half : 2 * half])
        x = jnp.concatenate([folded, x[2 * half :]]) if len(x) % 2 else folded
    return x[0]


def combine_in_order(weights: jax.Array, x: jax.Array, exists: jax.Array) -> jax.Array:
    r"""Weighted sum of the entries in ascending order, in each coordinate.

    .. math::

      d_p = \sum_k w_k \, x_{(k) p}, \quad x_{(1) p} \le \ldots \le x_{(T) p}

    Args:
      weights: shape ``(T,)``.
      x: shape ``(T, *p)``.
      exists: tasks that are present, shape ``(T,)``; the others come last.

    Returns:
      Array of shape ``p`` in float32 or better; not finite where an entry is not,
      whatever its weight.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_mtl import coordinates
      >>> x = jnp.array([[1.0, 5], [2, -90], [90, 6]])
      >>> exists = jnp.ones(3, bool)
      >>> print(coordinates.combine_in_order(jnp.array([0, 1.0, 0]), x, exists))
      [2. 5.]
    """
    accurate = jnp.promote_types(x.dtype, jnp.float32)
    weights = weights.astype(accurate)
    # No infinity: times a weight of 0 it would not be 0.
    last = jnp.finfo(x.dtype).max
    if len(x) > _MAX_SLICES:
        filled = jnp.where(tasks.along_tasks(exists, x), x, last)
        ordered = jnp.sort(filled, axis=0).astype(accurate)
        return jnp.tensordot(weights, ordered, 1, precision=jax.lax.Precision.HIGHEST)
    entries = [jnp.where(here, entry, last) for here, entry in zip(exists, x)]
    for i, j in _comparisons(len(x)):
        low = jnp.minimum(entries[i], entries[j])
        entries[i], entries[j] = low, jnp.maximum(entries[i], entries[j])
    return sum(w * entry.astype(accurate) for w, entry in zip(weights, entries))


def _comparisons(count: int) -> Iterator[tuple[int, int]]:
    """Which two to put in order, one after the other: Batcher's merge exchange."""
    sorted_runs = 1
    while sorted_runs < count:
        distance = sorted_runs
        while distance:
            for start in range(distance % sorted_runs, count - distance, 2 * distance):
                for i in range(start, min(start + distance, count - distance)):
                    j = i + distance
                    if i // (2 * sorted_runs) == j // (2 * sorted_runs):
                        yield i, j
            distance //= 2
        sorted_runs *= 2
