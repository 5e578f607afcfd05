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
from optax_mtl.gradients.disjoint import warn_of_own_data
from optax_mtl.gradients.own_data import own_task_grads
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels


def value_and_task_grads(
    losses_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    shared: Labels | None = None,
    sequential: bool = False,
    own_data: bool = False,
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
      own_data: whether each task has data of its own: ``losses_fn`` then maps the
        parameters and the data of one task to its loss, one number, and every array
        of the positional arguments of what is returned has a leading task axis.
        What is the same for all goes by keyword; ``jnp.arange(T)`` as an argument
        tells the number of the task, for its head. All tasks together cost one
        forward and one backward pass over their data. A task with fewer examples
        is padded and masked; one without any, its loss and gradient exactly zero,
        is absent.

    Returns:
      A function of the parameters and further arguments that returns
      ``(losses, updates)``, or ``((losses, aux), updates)``; every leaf of the
      updates has one leading task axis, those of heads excepted.

    Raises:
      TypeError: at the call, for parameters that are not floating point.
      ValueError: at the call, if the losses are neither a vector nor scalars; with
        ``own_data``, if ``losses_fn`` returns more than one, and for arguments whose
        leading axes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda x: {"a": (x**2).sum(), "b": x.sum()}
      >>> losses, updates = optax_mtl.value_and_task_grads(losses_fn)(jnp.ones(2))
      >>> print(updates)
      [[2. 2.]
       [1. 1.]]

      One batch for each task, and a head that the number of the task finds:

      >>> def loss_fn(params, task, x):
      ...   return jnp.mean(params["head"][task] * params["trunk"] * x)
      >>> fn = optax_mtl.value_and_task_grads(
      ...     loss_fn, own_data=True, shared={"trunk": True, "head": False}
      ... )
      >>> params = {"trunk": jnp.array(2.0), "head": jnp.array([1.0, 10.0])}
      >>> batches = jnp.array([[1.0, 3.0], [2.0, 4.0]])
      >>> losses, updates = fn(params, jnp.arange(2), batches)
      >>> print(losses, updates["trunk"], updates["head"])
      [ 4. 60.] [ 2. 30.] [4. 6.]
    """
    arguments.check_choice("has_aux", has_aux, (True, False))
    arguments.check_choice("sequential", sequential, (True, False))
    arguments.check_choice("own_data", own_data, (True, False))
    if own_data:
        return own_task_grads(losses_fn, has_aux, shared, sequential)

    def fn(params, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(losses_fn, has_aux, args, kwargs)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        pull_back = jax.linear_transpose(push_forward, *primals)
        if sequential or not isinstance(losses, list):
            warn_of_own_data(losses_fn, has_aux, params, args, kwargs, len(losses))
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
