"""The losses and the resolved gradient: a function with a state of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import tasks


@dataclasses.dataclass(frozen=True, eq=False)
class Resolver:
    """A function that returns losses, a resolved gradient and the next state.

    What :func:`value_and_grad` and :func:`value_and_grad_at_features` make. Call it
    as ``fn(params, state, *args, **kwargs)``; ``fn.init`` makes the first state.
    """

    init: Callable[..., optax.OptState]  # Of the parameters, or of all arguments.
    value_and_grad: Callable[..., tuple[Any, optax.Updates, optax.OptState]]

    def __call__(
        self, params: optax.Params, state: optax.OptState, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.Updates, optax.OptState]:
        """Returns ``(value, grads, state)``."""
        return self.value_and_grad(params, state, *args, **kwargs)


def resolve(
    method: optax.GradientTransformationExtraArgs,
    updates: optax.Updates | tasks.GramView,
    state: optax.OptState,
    like: optax.Params,
    losses: jax.Array,
    init_call: str,
) -> tuple[optax.Updates, optax.OptState]:
    """One update of a chain that begins with a method, and its next state.

    Args:
      method: the chain.
      updates: stacked gradients, or a view of them that combines them.
      state: of the chain.
      like: what the gradients are taken of; the result has its shapes.
      losses: shape ``(T,)``.
      init_call: how the right state is made, for the error.

    Raises:
      TypeError: for a chain that passes the gradients of the tasks on.
      ValueError: for a state of other shapes, before or after the update, and for
        results of other shapes.
    """
    differing = _differing(jax.eval_shape(method.init, like), state)
    if differing:
        raise ValueError(
            f"the state is not the one of this method at these parameters: {differing};"
            f" make it by {init_call}"
        )
    resolved, new_state = method.update(updates, state, like, losses=losses)
    if isinstance(resolved, tasks.GramView):
        resolved.refuse("this chain has no method that consumes the task axis: it")
    tasks.check_resolved(resolved, like)
    differing = _differing(state, new_state)
    if differing:
        raise ValueError(
            f"the update changes the state of the chain: {differing}. What comes before"
            " the method sees the gradients of all tasks stacked: wrap it as"
            " optax_mtl.per_task(tx, num_tasks), or put it after the method"
        )
    return resolved, new_state


def _differing(expected: Any, state: Any) -> str:
    """The first leaf by which the second state differs from the first, if any."""
    shapes_of = lambda tree: {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    shapes, others = shapes_of(expected), shapes_of(state)
    for path in shapes | others:
        shape, other = shapes.get(path, "none"), others.get(path, "none")
        if shape != other:
            return f"state{path} has shape {other}, expected {shape}"
    return ""
