"""A chain tried by shapes alone, before the first step."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from optax_mtl import arguments, guards, tasks
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels, labels_of


def check(
    tx: Any,
    params: Any,
    num_tasks: int,
    *,
    losses: Any = ...,
    shared: Labels | None = None,
    labels: Labels | None = None,
) -> None:
    """Tries a chain on shapes, and raises the error that a training would need.

    Runs ``init`` and one ``update`` by :func:`jax.eval_shape`, which computes nothing
    and takes no memory. What would go wrong, aloud or silently, is an error: no method
    in the chain, something in front of it that mixes the tasks, a group of parameters
    that nothing resolves, another number of tasks, losses that are needed and not
    handed along, a state that changes from step to step.

    Args:
      tx: a chain that begins with a method; or an ``nnx.Optimizer`` or Flax
        ``TrainState`` that holds one.
      params: parameters, arrays or ``jax.ShapeDtypeStruct``; for an
        ``nnx.Optimizer``, its model or an ``nnx.State`` of them.
      num_tasks: number of tasks, T.
      losses: what the step hands along as ``losses=``, arrays or their shapes; ``None``
        for nothing. By default a vector of T in float32, or nothing to Flax's own
        ``TrainState``, which forwards nothing.
      shared: as handed to :func:`value_and_task_grads`, that of :mod:`optax_mtl.nnx`
        included; the gradients of the other parameters are not stacked.
      labels: as handed to :func:`optax.partition`, to name the group in the error.

    Raises:
      TypeError: if ``tx`` is no chain, if losses are needed, for parameters that are
        not floating point, and what the chain itself raises.
      ValueError: for everything else that is wrong with the chain.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> params = {"trunk": jnp.zeros((2, 3)), "head": jnp.zeros(3)}
      >>> tx = optax.chain(optax_mtl.upgrad(), optax.adam(1e-3))
      >>> optax_mtl.check(tx, params, num_tasks=2)
      >>> optax_mtl.check(optax.adam(1e-3), params, num_tasks=2)
      Traceback (most recent call last):
      ...
      ValueError: there is no method in this chain: the update of params['head'] has \
shape (2, 3), the parameter (3,); begin it with one, such as optax_mtl.linear(), \
which consumes the task axis
    """
    chain, params, shared, held, forwards = _chain_of(tx, params, shared)
    shared_part, heads = split(params, shared)
    arguments.check_count("num_tasks", num_tasks)
    shape_of = lambda p, *axes: jax.ShapeDtypeStruct(
        (*axes, *jnp.shape(p)), jnp.result_type(p)
    )
    stacked = jax.tree.map(lambda p: shape_of(p, num_tasks), shared_part)
    updates = merge(stacked, jax.tree.map(shape_of, heads))
    params = jax.tree.map(shape_of, params)
    if losses is ...:
        losses = jax.ShapeDtypeStruct((num_tasks,), jnp.float32) if forwards else None
    if losses is not None:
        jax.eval_shape(lambda losses: tasks.stack_losses(losses, num_tasks), losses)

    def step(updates, state, params, losses):
        return chain.update(updates, state, params, losses=losses)

    with jax.numpy_rank_promotion("allow"):  # What broadcasts is found below.
        state = jax.eval_shape(chain.init, params)
        differing = held is not None and tasks.differing_shapes(state, held)
        if differing:
            raise ValueError(
                "the state that is held was made by another chain, or of other"
                f" parameters: {differing}"
            )
        args = state, params, losses
        trace = jax.make_jaxpr(step, return_shape=True)
        with (
            tasks.marking_reads() as reads,
            _explained(state, shared, forwards, num_tasks, reads),
        ):
            program, (out, new_state) = trace(updates, *args)
    is_stacked = jax.tree.map(lambda g, p: g.ndim > p.ndim, updates, params)
    kinds = [
        _OF_TASKS if stacked else _OTHER for stacked in jax.tree.leaves(is_stacked)
    ]
    kinds += [_OTHER] * (len(program.jaxpr.invars) - len(kinds))
    _check_front(program.jaxpr, kinds, num_tasks, set())
    groups = labels_of(params, "" if labels is None else labels, "labels")
    _check_all_resolved(out, updates, params, groups)
    tasks.check_resolved(out, params)
    tasks.check_state_kept(state, new_state)
    _check_types_kept(state, new_state)


def _chain_of(tx, params, shared):
    """The chain, its parameters and mask, the state held, and if losses reach it."""
    held, forwards = None, True
    if hasattr(tx, "tx") and hasattr(tx, "opt_state"):
        holder, tx, held = tx, tx.tx, tx.opt_state
        if hasattr(holder, "wrt"):
            from flax import nnx  # An extra, installed where there is an Optimizer.

            from optax_mtl.nnx import mask_of_state

            model = params
            params = nnx.state(model, holder.wrt)
            if not jax.tree.leaves(params):
                raise ValueError(
                    f"wrt={holder.wrt} picks no variable of params, a"
                    f" {type(model).__name__}: hand over the model of this"
                    " nnx.Optimizer, or an nnx.State of its parameters"
                )
            shared = mask_of_state(params, shared)
            params, held = nnx.as_pure((params, held))
        else:
            forwards = not type(holder).apply_gradients.__module__.startswith("flax.")
    chain = arguments.as_transformation("tx", tx)
    return chain, params, shared, held, forwards


@contextlib.contextmanager
def _explained(
    state: Any, shared: Any, forwards: bool, num_tasks: int, reads: Iterator[int]
) -> Iterator[None]:
    """Adds to an error of the chain what only the caller of it knows."""
    try:
        yield
    except (TypeError, ValueError) as error:
        guards.explain_conditional(error, state)
        if next(reads) == 0:
            error.add_note(
                "No method has read the gradients so far, and what comes before one"
                " sees those of all tasks, stacked: put it after the method, or wrap it"
                f" as optax_mtl.per_task(tx, num_tasks={num_tasks})"
            )
        if not forwards:
            error.add_note(
                "Flax's TrainState hands no losses on: take"
                " optax_mtl.linen.TrainState, whose apply_gradients does"
            )
        if shared is not None:
            error.add_note(
                "With shared=, the gradients of the other parameters, the heads, are"
                " not stacked: lead them around the method by optax.partition("
                "{'shared': method, 'heads': optax.identity()}, labels)"
            )
        raise


# What an array of the program is made of: no task gradients, each by itself, or all.
_OTHER, _OF_TASKS, _MIXED = range(3)


def _check_front(
    jaxpr: Any, kinds: list[int], num_tasks: int, first: set[str]
) -> list[int]:
    """Raises if what comes before the method mixes the gradients of the tasks.

    Args:
      jaxpr: the program of an update, or a part of it.
      kinds: of its arguments.
      num_tasks: T, by which an array that kept the task axis is known.
      first: name of the first read, as soon as it is found; what follows may mix.

    Returns:
      The kinds of what it returns.
    """
    found = dict(zip(jaxpr.invars, kinds))
    kind_of = lambda v: _OTHER if isinstance(v, Literal) else found.get(v, _OTHER)
    for equation in jaxpr.eqns:
        inputs = [kind_of(v) for v in equation.invars]
        name = str(equation.params.get("name"))
        if name.startswith(tasks.READ) and not first:
            first.add(name)
        if name in first and _MIXED in inputs:
            raise ValueError(
                "the method does not come first: what precedes it mixes the gradients"
                " of the tasks, as optax.clip_by_global_norm takes one norm over them"
                " all. Put it after the method, or wrap it as optax_mtl.per_task(tx,"
                f" num_tasks={num_tasks})"
            )
        if equation.primitive.name == "cond":
            branches = [
                _check_front(branch.jaxpr, inputs[1:], num_tasks, first)
                for branch in equation.params["branches"]
            ]
            outputs = [max(kinds) for kinds in zip(*branches)]
        elif equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            outputs = _check_front(inner, inputs, num_tasks, first)
        else:
            kind = max(inputs, default=_OTHER)
            shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
            is_mixed = lambda shape, kind: (
                kind == _OF_TASKS and shape[:1] != (num_tasks,)
            )
            outputs = [_MIXED if is_mixed(shape, kind) else kind for shape in shapes]
        found.update(zip(equation.outvars, outputs))
    return [kind_of(v) for v in jaxpr.outvars]


def _check_all_resolved(out, updates, params, groups):
    """Raises where the task axis is still there, or the shape is another."""
    kept: list[str] = []
    others: list[str] = []
    total = 0

    def visit(path, param, update, out, group):
        nonlocal total
        total += update.ndim > param.ndim
        if out is not None and jnp.shape(out) != param.shape:
            name = f"params{jax.tree_util.keystr(path)}"
            name += f" (group {group!r})" if group else ""
            is_kept = update.ndim > param.ndim and jnp.shape(out) == update.shape
            (kept if is_kept else others).append(
                f"the update of {name} has shape {jnp.shape(out)}, the parameter"
                f" {param.shape}"
            )

    jax.tree_util.tree_map_with_path(visit, params, updates, out, groups)
    if kept and len(kept) == total:
        raise ValueError(
            f"there is no method in this chain: {kept[0]}; begin it with one, such as"
            " optax_mtl.linear(), which consumes the task axis"
        )
    if kept:
        raise ValueError(
            f"the method does not see all gradients: {kept[0]}. If the tasks share this"
            " parameter, let a method resolve it; if it is a head, leave its gradient"
            " unstacked by shared=, here and in value_and_task_grads; if it is frozen,"
            " put optax_mtl.sum_tasks() in front of optax.set_to_zero()"
        )
    if others:
        raise ValueError(f"{others[0]}, which would broadcast to it")


def _check_types_kept(state: Any, new_state: Any) -> None:
    """Raises where an update changes the structure or a type of the state."""
    type_of = lambda x: f"{x.dtype}{' (weakly typed)' if x.weak_type else ''}"

    def check(path, old, new):
        if type_of(old) != type_of(new):
            refused = ", and jax.lax.scan refuses it" if old.dtype != new.dtype else ""
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} is {type_of(old)} at first and"
                f" {type_of(new)} after an update, so that a step is traced twice"
                f"{refused}"
            )

    structure: Any = jax.tree.structure(state)
    if structure != jax.tree.structure(new_state):
        raise ValueError(
            "the update changes the structure of the state, so that a step is traced"
            " twice, and jax.lax.scan refuses it"
        )
    jax.tree_util.tree_map_with_path(check, state, new_state)
