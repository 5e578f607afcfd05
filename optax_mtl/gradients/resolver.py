"""The losses and the resolved gradient: a function with a state of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
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
    differing = tasks.differing_shapes(jax.eval_shape(method.init, like), state)
    if differing:
        raise ValueError(
            f"the state is not the one of this method at these parameters: {differing};"
            f" make it by {init_call}"
        )
    resolved, new_state = method.update(updates, state, like, losses=losses)
    if isinstance(resolved, tasks.GramView):
        resolved.refuse("this chain has no method that consumes the task axis: it")
    tasks.check_resolved(resolved, like)
    tasks.check_state_kept(state, new_state)
    return resolved, new_state
