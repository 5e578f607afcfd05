"""Gradients of tasks of which each has data of its own.

For many domains, environments or language pairs, and, as the extreme, for one
objective per example. All tasks go through one vectorised pass, so that T gradients
cost what the plain sum over all the data costs, and resolving them twice that. Where a
task has few rows of data, the Gram matrix takes no gradients at all (few_rows.py). The
tasks share one loss function and one shape of their batches; where tasks share a batch,
this would do its forward pass T times.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import base, tasks
from optax_mtl.gradients.backward import are_few, take_aux, vector_fn
from optax_mtl.gradients.few_rows import gram_of_tasks
from optax_mtl.gradients.measured import measure_on_part, split_measured
from optax_mtl.gradients.resolver import resolve
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels, mask_of


def own_task_grads(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    shared: Labels | None,
    sequential: bool,
) -> Callable[..., tuple[Any, optax.Updates]]:
    """What :func:`value_and_task_grads` makes with ``own_data``."""

    def one_by_one(primals, args, kwargs):
        """The memory of one task at a time."""
        loss_of = _of_one(loss_fn, has_aux, kwargs)
        of_parts = lambda *parts, args: loss_of(merge(*parts), *args)
        grad = jax.grad(of_parts, (0, 1), has_aux=True)

        def add(total, args):
            (updates, heads), value = grad(*primals, args=args)
            return optax.tree.add(total, heads), (value, updates)

        zeros = base.zeros_like(primals[1])
        heads, (value, updates) = jax.lax.scan(add, zeros, args)
        return value, merge(updates, heads)

    def fn(params, *args, **kwargs):
        count_tasks(args)
        primals = split(params, shared)
        if sequential:
            return one_by_one(primals, args, kwargs)
        size = lambda tree: sum(map(jnp.size, jax.tree.leaves(tree)))
        if size(primals[1]) > size(primals[0]):
            # T gradients of such heads would take more memory than all others: the sum
            # of the losses is differentiated for them. XLA merges the forward passes,
            # scans excepted.
            value, updates = own_gradients(loss_fn, has_aux, primals, args, kwargs)
            losses_of = vector_fn(own_losses(loss_fn, has_aux), has_aux, args, kwargs)
            losses, pull_back, _ = jax.vjp(losses_of, *primals, has_aux=True)
            return value, merge(updates, pull_back(jnp.ones_like(losses))[1])
        everything = params, jax.tree.map(lambda _: None, params)
        value, updates = own_gradients(loss_fn, has_aux, everything, args, kwargs)
        stacked, heads = split(updates, mask_of(params, shared, "shared"))
        return value, merge(stacked, jax.tree.map(lambda g: g.sum(axis=0), heads))

    return fn


def own_resolved(
    loss_fn: Callable[..., Any],
    method: optax.GradientTransformationExtraArgs,
    has_aux: bool,
    mode: str,
    shared: Labels | None,
    measure: Labels | None,
    init_call: str,
) -> Callable[..., tuple[Any, optax.Updates, optax.OptState]]:
    """What :func:`value_and_grad` makes with ``own_data``.

    The Gram matrix comes from few rows of activations, or from the gradients of all
    tasks, of which the compiler frees one leaf after the other; one backward pass of
    the weighted losses follows. With few gradients, ``"auto"`` holds them instead.
    """
    task_grads = own_task_grads(loss_fn, has_aux, shared, sequential=False)

    def resolve_all(params, state, *args, **kwargs):
        value, updates = task_grads(params, *args, **kwargs)
        stacked, heads = split(updates, mask_of(params, shared, "shared"))
        like, _ = split(params, shared)
        chain = method
        if measure is not None:
            chain = measure_on_part(method, *split_measured(params, like, measure))
        losses, _ = take_aux(value, has_aux)
        grads, state = resolve(chain, stacked, state, like, losses, init_call)
        return value, merge(grads, heads), state

    def resolve_leafwise(params, state, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(own_losses(loss_fn, has_aux), has_aux, args, kwargs)
        losses, pull_back, value = jax.vjp(losses_of, *primals, has_aux=True)
        ones = jnp.ones_like(losses)  # Sharded as the losses are.

        def gram_of(part, rest):
            loss_of = _of_one(loss_fn, has_aux, kwargs)
            of_part = lambda part, *args: loss_of(merge(part, rest), *args)[0]
            return gram_of_tasks(of_part, part, args)

        def gradients():
            return own_gradients(loss_fn, has_aux, primals, args, kwargs)[1]

        measured = primals
        if measure is not None:
            part, rest = split_measured(params, primals[0], measure)
            measured = part, merge(rest, primals[1])

        view = tasks.GramView(
            len(losses),
            lambda: gram_of(*measured),
            lambda weights: pull_back(ones * weights.astype(ones.dtype))[0],
            lambda weights, keep: tasks.combine(
                weights, tasks.drop_tasks(keep, gradients())
            ),
        )
        grads, state = resolve(method, view, state, primals[0], losses, init_call)
        return value, merge(grads, pull_back(ones)[1]), state

    def fn(params, state, *args, **kwargs):
        few = are_few(count_tasks(args), split(params, shared)[0])
        if mode == "stacked" or (mode == "auto" and few and measure is None):
            return resolve_all(params, state, *args, **kwargs)
        try:
            return resolve_leafwise(params, state, *args, **kwargs)
        except tasks.NeedsTaskGrads:
            if mode != "auto":
                raise
            return resolve_all(params, state, *args, **kwargs)

    return fn


def own_losses(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """A function to the losses of all tasks out of one to that of one task."""

    def losses_fn(params, *args, **kwargs):
        count_tasks(args)
        loss_of = _of_one(loss_fn, has_aux, kwargs)
        return jax.vmap(lambda args: loss_of(params, *args)[1])(args)

    return losses_fn


def own_gradients(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    primals: tuple[Any, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, optax.Updates]:
    """What ``loss_fn`` returned, and the gradients of the shared part, both stacked."""
    count_tasks(args)
    shared_part, heads = primals
    loss_of = _of_one(loss_fn, has_aux, kwargs)
    of_shared = lambda part, args: loss_of(merge(part, heads), *args)
    grad = jax.grad(of_shared, has_aux=True)
    updates, value = jax.vmap(lambda args: grad(shared_part, args))(args)
    return value, updates


def _of_one(loss_fn, has_aux, kwargs):
    """Function of the parameters and the data of one task to its loss."""

    def loss_of(params, *args):
        value = loss_fn(params, *args, **kwargs)
        loss, _ = take_aux(value, has_aux)
        if not jax.tree_util.all_leaves([loss]) or jnp.ndim(loss):
            raise ValueError(
                "with own_data=True, losses_fn sees the data of one task, without the"
                " task axis, and returns its loss, one number, but returned shapes"
                f" {jax.tree.map(jnp.shape, loss)}; average the loss over the examples"
                " (where tasks share a batch, leave own_data out)"
            )
        return loss, value

    return loss_of


def count_tasks(args: tuple[Any, ...]) -> int:
    """The number of tasks, by which every array of the arguments begins.

    Raises:
      ValueError: without arrays, and for leading axes of different sizes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(args)
    name = lambda path: f"argument {path[0].idx}{jax.tree_util.keystr(path[1:])}"
    shapes = [(name(path), jnp.shape(x)) for path, x in leaves]
    if not shapes:
        raise ValueError(
            "with own_data=True the data of the tasks come as positional arguments,"
            " stacked along a leading task axis, but there are none"
        )
    (first, shape), *_ = shapes
    for other, found in shapes:
        if not found or found[0] != shape[0]:
            raise ValueError(
                "with own_data=True the leading axis of every positional argument is"
                f" that of the tasks, but {first} has shape {shape} and {other}"
                f" {found}: stack the data of the tasks, pad and mask those that have"
                " less, and pass by keyword what is the same for all"
            )
    if not shape[0]:
        raise ValueError(f"{first} of shape {shape} holds the data of no task")
    return shape[0]
