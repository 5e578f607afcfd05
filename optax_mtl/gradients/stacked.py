"""The losses and the gradient of each task, stacked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments
from optax_mtl.gradients.backward import (
    basis_of,
    pull_back_each,
    pull_back_in_turn,
    vector_fn,
)
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels


def value_and_task_grads(
    losses_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    shared: Labels | None = None,
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
      shared: which parameters all tasks share: a tree of bools as in
        :func:`optax.masked`, a function of the path of a parameter, such as
        ``lambda path: "trunk" in path``, or of the parameters to such a tree.
        The other parameters (heads) get the ordinary gradient of the sum of the
        losses, not stacked, so that they cost nothing more. ``None``: all.
      sequential: whether to run the backward passes one after the other, with
        memory for one at a time, instead of batched.

    Returns:
      A function of the parameters and further arguments that returns
      ``(losses, updates)``, or ``((losses, aux), updates)``; every leaf of the
      updates has one leading task axis, those of heads excepted.

    Raises:
      TypeError: at the call, for parameters that are not floating point.
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
    arguments.check_choice("has_aux", has_aux, (True, False))
    arguments.check_choice("sequential", sequential, (True, False))

    def fn(params, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(losses_fn, has_aux, args, kwargs)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        pull_back = jax.linear_transpose(push_forward, *primals)
        if sequential:
            pull_back_from = pull_back_in_turn(push_forward, primals, losses)
            basis = basis_of(losses)
            numbers = jnp.arange(len(losses))
            updates = jax.lax.map(
                lambda inputs: pull_back_from(*inputs)[0], (numbers, basis)
            )
        else:
            updates = pull_back_each(push_forward, primals, losses)[0]
        ones = jax.tree.map(jnp.ones_like, losses)
        return value, merge(updates, pull_back(ones)[1])

    return fn
