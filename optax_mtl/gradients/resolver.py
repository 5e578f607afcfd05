"""The losses and the resolved gradient: a function with a state of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_mtl import arguments, guards, tasks


@dataclasses.dataclass(frozen=True, eq=False)
class Resolver:
    """A function that returns losses, a resolved gradient and the next state.

    What :func:`value_and_grad` and :func:`value_and_grad_at_features` make. Call it
    as ``fn(params, state, *args, **kwargs)``; ``fn.init`` makes the first state.
    """

    init: Callable[..., optax.OptState]  # Of the parameters, or of all arguments.
    value_and_grad: Callable[..., tuple[Any, optax.Updates, optax.OptState]]

    __name__ = "value_and_grad"  # In profiles, as jax.jit calls the program.

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
    losses: Any,
    init_call: str,
) -> tuple[optax.Updates, optax.OptState]:
    """One update of a chain that begins with a method, and its next state.

    Args:
      method: the chain.
      updates: stacked gradients, or a view of them that combines them.
      state: of the chain.
      like: what the gradients are taken of; the result has its shapes.
      losses: shape ``(T,)``, or a dict of scalars, by whose names options may go.
      init_call: how the right state is made, for the error.

    Raises:
      TypeError: for a chain that passes the gradients of the tasks on.
      ValueError: for a state of other shapes, before or after the update, and for
        results of other shapes.
    """
    _check_state(method, state, like, "method", init_call)
    return guards.checked(method).update(updates, state, like, losses=losses)


def with_optimizer(
    resolver: Resolver,
    optimizer: optax.GradientTransformation,
    has_aux: bool,
    init_call: str,
) -> Resolver:
    """The same, followed by an optimizer of all parameters; one state holds both.

    The state is that of ``optax.chain(method, optimizer)``, if nothing but shared
    parameters is there.

    Args:
      resolver: of a method.
      optimizer: receives the gradient of all parameters, and the losses as the method
        does, with their names.
      has_aux: whether the resolver returns a pair, losses and auxiliary data.
      init_call: how the right state is made, for the error.
    """
    optimizer = guards.checked(arguments.as_transformation("optimizer", optimizer))

    def init(params, *args, **kwargs):
        return resolver.init(params, *args, **kwargs), optimizer.init(params)

    def fn(params, state, *args, **kwargs):
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise ValueError(
                "the state should be a pair, that of the method and that of the"
                f" optimizer, but is {jax.tree.structure(state)}; make it by"
                f" {init_call}"
            )
        method_state, optimizer_state = state
        _check_state(optimizer, optimizer_state, params, "optimizer", init_call)
        value, grads, method_state = resolver(params, method_state, *args, **kwargs)
        losses = value[0] if has_aux else value
        updates, optimizer_state = optimizer.update(
            grads, optimizer_state, params, losses=losses
        )
        return value, updates, (method_state, optimizer_state)

    return Resolver(init, fn)


def _check_state(tx, state, params, name, init_call):
    differing = tasks.differing_shapes(jax.eval_shape(tx.init, params), state)
    if differing:
        raise ValueError(
            f"the state is not the one of this {name} at these parameters: {differing};"
            f" make it by {init_call}"
        )
