"""Sums and order over the tasks, in each coordinate, and sums over the coordinates.

On a CPU, XLA reduces a leading axis twenty times slower than it adds its slices, and
sorts along one a hundred times slower than it compares and exchanges them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_mtl import tasks

# More tasks would be more operations than are worth their compilation.
_MAX_SLICES = 32


# What an array with a leading task axis is made of, or that array.
Rows = list[jax.Array] | jax.Array


def each(of_task: Callable[..., jax.Array], *rows: Any) -> Rows:
    """What is made of the entries of each task, in a form that fuses with a sum.

    Args:
      of_task: maps what the arrays hold for a task to an array of shape ``p``.
      *rows: arrays with a leading task axis, such as ``(T, *p)`` or ``(T,)``, or what
        this function returned.

    Returns:
      Rows for :func:`reduce` and for this function.
    """
    in_slices = len(rows[0]) <= _MAX_SLICES and all(
        isinstance(x, list) or tasks.on_one_cpu(x) for x in rows
    )
    if not in_slices:  # Slices along shards would be moved.
        return jax.vmap(of_task)(*rows)
    return [of_task(*entries) for entries in zip(*map(list, rows))]


def reduce(ufunc: Any, rows: Rows) -> jax.Array:
    """Reduces the task axis in one pass, together with what made the rows.

    Args:
      ufunc: such as ``jnp.add`` or ``jnp.maximum``.
      rows: what :func:`each` returned.

    Returns:
      Array of shape ``p``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_mtl import coordinates
      >>> updates, weights = jnp.array([[-4.0, 1, 1], [6, 1, 1]]), jnp.array([0.5, 1])
      >>> rows = coordinates.each(jnp.multiply, weights, updates)
      >>> print(coordinates.reduce(jnp.add, rows))
      [4.  1.5 1.5]
    """
    if isinstance(rows, list):
        return functools.reduce(ufunc, rows)
    if not tasks.on_one_cpu(rows):
        return ufunc.reduce(rows, axis=0)
    while len(rows) > 1:
        half = len(rows) // 2
        folded = ufunc(rows[:half], rows[half : 2 * half])
        odd = len(rows) % 2
        rows = jnp.concatenate([folded, rows[2 * half :]]) if odd else folded
    return rows[0]


def sum_and_any(values: jax.Array, marks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the values of each task and whether one of its marks is set, in one pass.

    On a CPU, XLA stores what it sums alone before it does so; two at once it does not.

    Args:
      values: shape ``(T, *p)``, numbers.
      marks: shape ``(T, *p)``, booleans.

    Returns:
      Two arrays of shape ``(T,)``.
    """
    total, some = values, marks
    if values.ndim > 1 and tasks.on_one_cpu(values):  # XLA gathers what is sharded.
        # Of the last axis alone: one number after the other loses digits.
        start = np.zeros([], values.dtype), np.zeros([], bool)
        both = lambda x, y: (x[0] + y[0], x[1] | y[1])
        total, some = jax.lax.reduce((total, some), start, both, [values.ndim - 1])
    axes = tuple(range(1, total.ndim))
    return total.sum(axes), some.any(axes)


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
    terms = [w * entry.astype(accurate) for w, entry in zip(weights, entries)]
    return functools.reduce(jnp.add, terms)


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
