"""Methods that weigh running averages of the gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import base, report, tasks


class AveragesState(NamedTuple):
    """State of a method made by :func:`from_averages`."""

    counts: jax.Array  # Gradients seen from each task, shape `(T,)`.
    averages: optax.Updates  # Their running averages, float32, `(T, *p)`.
    inner: Any  # State behind the weights.

    def __repr__(self):
        return report.describe_state(self)


def from_averages(
    init_fn: Callable[[], Any],
    step: Callable[..., tuple[jax.Array, Any]],
    num_tasks: int,
    *,
    decay: Callable[[jax.Array], jax.typing.ArrayLike],
    scale: Callable[[jax.Array, Any], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method out of weights for running averages of the gradients.

    Args:
      init_fn: returns the initial state behind the weights.
      step: maps that state and ``gram``, the Gram matrix of the averages of the tasks
        that are present, shape ``(T, T)``, to weights, ``(T,)``, and the next state.
      num_tasks: number of tasks, T.
      decay: maps how often each task has been seen, ``(T,)``, to the decays of the
        averages, which start from zero.
      scale: maps the squared norms of the gradients, ``(T,)``, and the losses to
        factors of the gradients, ``(T,)``; a task with a factor of 0 is absent.

    Returns:
      A gradient transformation that aggregates stacked updates.
    """

    def init(params):
        return AveragesState(
            counts=jnp.zeros(num_tasks, jnp.int32),
            averages=base.zeros_like(params, num_tasks, dtype=float),
            inner=init_fn(),
        )

    def update(updates, state, params=None, *, losses=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        squares = tasks.squared_norms(updates)
        factors = jnp.ones(num_tasks) if scale is None else scale(squares, losses)
        exists = tasks.has_gradient(updates) & (factors != 0)
        # Known before the averages are, which are then written in place, and once.
        finite = base.all_finite((squares, factors))
        counts = optax.safe_increment(state.counts)
        decays = jnp.asarray(decay(counts.astype(float)))

        def average(old, g):
            along = lambda v: tasks.along_tasks(v, old)
            new = along(decays) * old + along((1 - decays) * factors) * g
            return jnp.where(along(exists & finite), new, old).astype(old.dtype)

        averages = jax.tree.map(average, state.averages, updates)
        gram = jnp.where(jnp.outer(exists, exists), tasks.gram(averages), 0)
        weights, inner = step(state.inner, gram=gram)
        weights = jnp.where(finite, jnp.where(exists, weights, 0), jnp.nan)
        out = tasks.combine(weights, averages)
        cast = jax.tree.map(lambda d, g: d.astype(g.dtype), out, updates)
        return cast, AveragesState(
            counts=jnp.where(exists & finite, counts, state.counts),
            averages=averages,
            inner=base.keep_if(base.all_finite(out), inner, state.inner),
        )

    return optax.GradientTransformationExtraArgs(init, update)
