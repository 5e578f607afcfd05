"""The contract of a method, and the plumbing that every method shares.

A method is an :class:`optax.GradientTransformationExtraArgs` that consumes the
task axis. Its ``update`` receives *stacked* updates (the structure of the
parameters, every leaf with one leading axis of size T, the number of tasks) and
returns updates with the shapes of the parameters, so it comes first in
:func:`optax.chain`. Every method

* accepts the extra argument ``losses``, whether or not it reads it;
* takes names for numbers in the options that are about tasks, those of a dict of
  losses (:mod:`optax_mtl.names`);
* measures in float32 or better and returns the dtypes of the gradients;
* treats a task whose gradient is exactly zero as absent: the other tasks get
  what they would get without it, and its own statistics stay as they are;
* takes complex gradients, as JAX returns them, for pairs of real ones;
* sees norms from 1e-15 to 1e15: in float32, smaller gradients lose digits when they
  are squared, from 1e-19 they vanish, and from 1e19 on they count as not finite
  (methods that square nothing see every float32 number);
* returns non-finite updates for non-finite gradients; whenever its update is not
  finite it leaves its state as it was, so that :func:`optax.apply_if_finite` may
  skip the step;
* raises at trace time for updates that are not stacked gradients.

Most methods are a pure function from the Gram matrix, the losses and a small
state to the weights of the tasks; the functions below make a transformation out
of such a function. The others traverse the gradients with ``jax.tree.map`` and are
made by :func:`from_coordinates`, which shows them real numbers only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, names, tasks


def from_gram(
    weights_fn: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Makes a method out of weights that depend on the Gram matrix alone.

    ``optax_mtl.testing.check_contract`` tries whether it keeps the contract above.

    Args:
      weights_fn: maps the Gram matrix, shape ``(T, T)``, to weights, ``(T,)``.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> def inverse_norms(gram):
      ...     norms = jnp.sqrt(jnp.diagonal(gram))
      ...     return 1 / jnp.where(norms > 0, norms, jnp.inf)  # Some may be absent.
      >>> unit_sum = optax_mtl.from_gram(inverse_norms)
      >>> updates = jnp.array([[3.0, 4], [0, 2]])
      >>> update, _ = unit_sum.update(updates, unit_sum.init(None))
      >>> print(jnp.array_str(update, precision=3))
      [0.6 1.8]
    """
    arguments.check_function("weights_fn", weights_fn)
    return from_state(
        optax.EmptyState, lambda state, gram: (weights_fn(gram), state), reads=["gram"]
    )


@names.by_name("min_losses")
def from_losses(
    weights_fn: Callable[[jax.Array], jax.Array],
    *,
    min_losses: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method out of weights that depend on the losses alone.

    Args:
      weights_fn: maps the losses, shape ``(T,)``, to weights, ``(T,)``.
      min_losses: as in :func:`from_state`.

    Returns:
      A gradient transformation that aggregates stacked updates and needs the
      extra argument ``losses``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> weights = lambda losses: 1 / jnp.where(losses > 0, losses, jnp.inf)
      >>> inverse = optax_mtl.from_losses(weights)
      >>> updates, losses = jnp.array([[3.0, 4], [0, 2]]), jnp.array([2.0, 1])
      >>> print(inverse.update(updates, inverse.init(None), losses=losses)[0])
      [1.5 4. ]
    """
    arguments.check_function("weights_fn", weights_fn)
    return from_state(
        optax.EmptyState,
        lambda state, losses: (weights_fn(losses), state),
        reads=["losses"],
        min_losses=min_losses,
    )


@names.by_name("min_losses")
def from_state(
    init_fn: Callable[[], Any],
    step: Callable[..., tuple[jax.Array, Any]],
    num_tasks: int | None = None,
    *,
    reads: Sequence[str],
    min_losses: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method out of weights that depend on a small state as well.

    Args:
      init_fn: returns the initial state, a tree of arrays.
      step: maps the state and, by keyword, what the method reads to the weights,
        shape ``(T,)``, and the next state.
      num_tasks: T, if the shapes in the state depend on it.
      reads: what ``step`` reads: any of ``"gram"`` (shape ``(T, T)``) and
        ``"losses"`` (shape ``(T,)``); with neither, the number of tasks is
        passed as ``count``.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, for a ``step`` that takes losses for magnitudes: it gets
        ``losses_above`` them. ``None`` hands the losses on as they are.

    Returns:
      A gradient transformation that aggregates stacked updates. Where what it
      read is not finite, or the state would not be any more, the weights are NaN;
      where the update is not finite, the state stays as it was.
    """

    arguments.check_function("init_fn", init_fn)
    arguments.check_function("step", step)
    if isinstance(reads, str):
        raise TypeError(f"reads is {reads!r}; it should be a list, such as [{reads!r}]")
    for name in reads:
        arguments.check_choice("reads", name, ("gram", "losses"))

    def init(params):
        del params
        state = init_fn()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not hasattr(leaf, "dtype"):
                raise TypeError(
                    f"init_fn returned {leaf!r} as state{jax.tree_util.keystr(path)},"
                    " which is no array: make it one, such as jnp.zeros([], jnp.int32),"
                    " so that a step keeps its dtype"
                )
        return state

    def update(updates, state, params=None, *, losses=None, **extra_args):
        del extra_args
        count = tasks.check_stacked(updates, params, num_tasks, gram_suffices=True)
        if count is None:
            return updates, state
        measured: dict[str, Any] = {}
        if "gram" in reads:
            measured["gram"] = tasks.gram(updates)
        if "losses" in reads:
            measured["losses"] = losses_above(
                tasks.stack_losses(losses, count), min_losses
            )
        finite = all_finite(measured)
        with jax.default_matmul_precision("highest"):  # GPUs and TPUs round else.
            weights, new_state = _weights_and_state(
                step(state, **(measured or {"count": count})), state, count
            )
        finite &= stays_finite(new_state, state)
        # Whoever reads no gradients learns here alone that they are not finite.
        update = tasks.combine(jnp.where(finite, weights, jnp.nan), updates)
        return update, keep_if(all_finite(update), new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _weights_and_state(returned: Any, state: Any, count: int) -> tuple[jax.Array, Any]:
    """What a step returned, if it is that.

    Raises:
      TypeError: for something else than a pair of weights and a state, or weights that
        are no array.
      ValueError: for a state of another structure or other shapes than before.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            "a step should return a pair, the weights and the next state, but returned"
            f" shapes {jax.tree.map(jnp.shape, returned)}"
        )
    weights, new_state = returned
    if not hasattr(weights, "dtype"):
        raise TypeError(
            f"the weights are {weights!r}, expected an array of shape ({count},)"
        )
    differing = tasks.differing_shapes(state, new_state)
    same: Any = jax.tree.structure(state)
    if differing or same != jax.tree.structure(new_state):
        raise ValueError(
            "a step should return a state like the one it got, from init_fn, but"
            f" {differing or f'it changed {same} to {jax.tree.structure(new_state)}'}"
        )
    return weights, new_state


def from_coordinates(
    init_fn: Callable[[optax.Params], Any],
    update_fn: Callable[..., tuple[optax.Updates, Any]],
) -> optax.GradientTransformationExtraArgs:
    """Makes a method out of functions that go through the gradients by themselves.

    The functions see a complex leaf as a real one whose last axis holds the real and
    the imaginary part, so that they compare, sort and average real numbers only.

    Args:
      init_fn: as that of an Optax transformation.
      update_fn: the same.

    Returns:
      A gradient transformation that aggregates stacked updates.
    """

    def init(params):
        return init_fn(_complex_to_pairs(params))

    def update(updates, state, params=None, **extra_args):
        if isinstance(updates, tasks.GramView):
            updates.refuse("this method")
        out, state = update_fn(
            _complex_to_pairs(updates), state, _complex_to_pairs(params), **extra_args
        )
        return jax.tree.map(_pairs_to_complex, updates, out), state

    return optax.GradientTransformationExtraArgs(init, update)


def _complex_to_pairs(tree: Any) -> Any:
    split = lambda x: jnp.stack([x.real, x.imag], axis=-1)
    return jax.tree.map(lambda x: split(x) if np.iscomplexobj(x) else x, tree)


def _pairs_to_complex(like: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.complex(x[..., 0], x[..., 1]) if np.iscomplexobj(like) else x


class MeasuredLossesState(NamedTuple):
    """State of a method that measures its reference losses first."""

    counts: jax.Array  # Steps of each task, up to the end of the window, `(T,)`.
    total: jax.Array  # Sum of the losses in the window, `(T,)`.


@names.by_name("reference", "min_losses")
def with_reference(
    weights_fn: Callable[[jax.Array, jax.Array], jax.Array],
    num_tasks: int,
    reference: names.PerTask | None,
    warmup_steps: int,
    window: int,
    min_losses: names.PerTask,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method that compares the losses with given or with measured ones.

    Args:
      weights_fn: from the losses and the reference, each of shape ``(T,)``, to the
        weights, ``(T,)``.
      num_tasks: number of tasks, T.
      reference: one number, shape ``(T,)`` or a dict by name; ``None`` takes the
        average over a window of steps, in and before which the sum of the log losses is
        minimised.
      warmup_steps: steps before the window.
      window: number of steps in it.
      min_losses: lower bounds, from which both are counted.

    Returns:
      A gradient transformation that aggregates stacked updates.
    """
    if reference is not None:
        given = arguments.for_each_task(
            "reference", reference, num_tasks, float
        ) - arguments.for_each_task("min_losses", min_losses, num_tasks, float)
        return from_state(
            optax.EmptyState,
            lambda state, losses: (weights_fn(losses, given), state),
            num_tasks,
            reads=["losses"],
            min_losses=min_losses,
        )

    def init_fn():
        return MeasuredLossesState(
            jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks)
        )

    def step(state, losses):
        exists = losses != 0
        known = state.counts >= warmup_steps + window
        measured = jnp.where(known, state.total / window, 1)
        weights = jnp.where(
            jnp.all(known | ~exists),
            weights_fn(losses, measured),
            reciprocal(losses),
        )
        grows = exists & ~known
        in_window = grows & (state.counts >= warmup_steps)
        return weights, MeasuredLossesState(
            counts=state.counts + grows,
            total=state.total + jnp.where(in_window, losses, 0),
        )

    return from_state(init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses)


def losses_above(losses: jax.Array, min_losses: names.PerTask | None) -> jax.Array:
    """The losses minus their lower bounds; NaN for a loss below its own.

    A loss of exactly 0, that of an absent task, stays 0. One that is exactly at its
    bound cannot fall and becomes 0 as well: there is nothing to weigh.

    Args:
      losses: shape ``(T,)``.
      min_losses: one number or shape ``(T,)``; ``None`` returns the losses.

    Returns:
      Array of shape ``(T,)``.

    Raises:
      ValueError: for a number of bounds other than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_mtl import base
      >>> losses = jnp.array([2.0, -0.5, 0.0, -1.0])
      >>> print(base.losses_above(losses, -1.0))
      [3.  0.5 0.  0. ]
      >>> print(base.losses_above(losses, 0.0))
      [ 2. nan  0. nan]
    """
    if min_losses is None:
        return losses
    bounds = arguments.for_each_task(
        "min_losses", min_losses, len(losses), losses.dtype
    )
    above = jnp.where(losses == 0, 0, losses - bounds)
    return jnp.where(above >= 0, above, jnp.nan)


def zeros_like(
    params: optax.Params,
    num_tasks: int | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> optax.Params:
    """Zeros like the parameters, laid out over devices as they are.

    Args:
      params: parameters, leaves of shape ``p``.
      num_tasks: T, for leaves of shape ``(T, *p)``.
      dtype: by default that of each parameter; complex for a complex one.

    Returns:
      Tree of arrays.
    """

    def zeros(p):
        if not isinstance(p, jax.Array):  # A number, or the shape of an array.
            p = jnp.zeros_like(p)
        # Zero whatever the parameter. Under jit, zeros that do not depend on it would
        # be whole on every device.
        kind = jnp.result_type(dtype or p.dtype)
        if jnp.iscomplexobj(p):
            kind = jnp.promote_types(kind, jnp.complex64)
        leaf = jnp.where(p == 0, jnp.abs(p), 0).astype(kind)
        shape = leaf.shape if num_tasks is None else (num_tasks, *leaf.shape)
        return jnp.broadcast_to(leaf, shape)

    return jax.tree.map(zeros, params)


def all_finite(tree: Any) -> jax.Array:
    """Whether all entries of all floating-point arrays are finite, a scalar."""
    failed = [
        (~jnp.isfinite(tasks.largest(x, tuple(range(x.ndim))))).astype(float)
        for x in map(jnp.asarray, jax.tree.leaves(tree))
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return tasks.sum_leaves(failed) == 0 if failed else jnp.array(True)


def stays_finite(new_state: Any, old_state: Any) -> jax.Array:
    """Whether all that is finite in a state still is in the next, a scalar."""
    lost = [
        jnp.any(jnp.isfinite(old) & ~jnp.isfinite(new))
        for new, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(old_state))
        if jnp.issubdtype(old.dtype, jnp.inexact)
    ]
    return ~jnp.any(jnp.stack(lost)) if lost else jnp.array(True)


def keep_if(condition: jax.Array, new_state: Any, old_state: Any) -> Any:
    """The new state where the condition holds, else the old; dtypes of the old."""

    choose = lambda new, old: jnp.where(
        condition, jnp.asarray(new).astype(old.dtype), old
    )
    return jax.tree.map(choose, new_state, old_state)


def again(fn: Callable[..., Any], *args: Any) -> Any:
    """The same as ``fn(*args)``, computed anew where XLA would store it meanwhile.

    For what is cheaper to compute twice than to store, such as a new state before it is
    known whether to keep it.
    """
    return fn(*jax.lax.optimization_barrier(args))


def regularize(gram: jax.Array, reg_eps: jax.typing.ArrayLike) -> jax.Array:
    """Adds a multiple of the trace to the diagonal, but not for absent tasks."""
    exists = tasks.present(gram).astype(gram.dtype)
    return gram + jnp.diag(reg_eps * jnp.trace(gram) * exists)


def update_if(
    exists: jax.Array,
    tx: optax.GradientTransformation,
    update: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """The update and new state of a transformation; zero and the old if absent."""
    new_update, new_state = tx.update(update, state, params, **extra_args)
    choose = lambda new, old: jnp.where(exists, new, 0).astype(old.dtype)
    return (
        jax.tree.map(choose, new_update, update),
        keep_if(exists, new_state, state),
    )


def update_tasks(
    tx: optax.GradientTransformation,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """The update and new state of each task on its own; zero and the old if absent."""
    # Squares of small numbers vanish in float16.
    precise = jax.tree.map(
        lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), updates
    )
    update_one = lambda exists, g, s: update_if(exists, tx, g, s, params, **extra_args)
    return jax.vmap(update_one)(tasks.has_gradient(updates), precise, state)


def update_each(
    exists: jax.Array,
    optimizer: optax.GradientTransformation,
    gradient: jax.Array,
    state: optax.OptState,
    values: jax.Array,
) -> tuple[jax.Array, optax.OptState]:
    """One step of an optimizer on one number for each task, such as its weight.

    Args:
      exists: tasks that take part; the others keep their value and state.
      optimizer: any optimizer; sees each number on its own.
      gradient: shape ``(T,)``.
      state: of the optimizer, ``jax.vmap(optimizer.init)(values)`` at first.
      values: shape ``(T,)``.

    Returns:
      The new values and the new state.
    """
    update_one = lambda exists, g, s, value: update_if(exists, optimizer, g, s, value)
    steps, state = jax.vmap(update_one)(exists, gradient, state, values)
    return values + steps, state


def reciprocal(x: jax.Array) -> jax.Array:
    """One over each entry, and 0 for an entry of 0: that of an absent task."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def softmax(logits: jax.Array, exists: jax.Array) -> jax.Array:
    """Softmax over the tasks that are present; 0 for the others, and for all if none.

    With ``where`` alone, that of JAX is NaN without any, and infinite on the way.
    """
    lowest = jnp.finfo(logits.dtype).min
    top = jnp.max(jnp.where(exists, logits, lowest), axis=-1, keepdims=True)
    sizes = jnp.where(exists, jnp.exp(jnp.where(exists, logits - top, 0)), 0)
    return sizes * reciprocal(jnp.sum(sizes, axis=-1, keepdims=True))
