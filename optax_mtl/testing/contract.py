"""What base.py asks of every method, as laws that a method keeps or breaks."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, tasks
from optax_mtl.testing.samples import compiled_fast, losses, params, stacked

Make = Callable[[int], Any]


def check_contract(make: Make, *, reads: Collection[str] = ("gram",)) -> None:
    """Raises if a method breaks a law of the contract.

    Args:
      make: returns the method for a number of tasks.
      reads: what the method reads: any of ``"gram"``, ``"losses"`` and, for one that
        goes through the gradients by itself, ``"gradients"``.

    Raises:
      AssertionError: with the law that is broken, and the numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> from optax_mtl import testing
      >>> inverse = lambda gram: jnp.diagonal(gram) ** -0.5
      >>> testing.check_contract(lambda num_tasks: optax_mtl.from_gram(inverse))
      Traceback (most recent call last):
      ...
      AssertionError: absent_tasks: a task whose gradient is zero is absent, and where \
all are the update is zero. With gradient 1 of 3 zero: the update['b']['c'] is not \
finite: [nan nan nan nan]
    """
    for law in LAWS:
        check_law(law, make, reads=reads)


def check_law(law: str, make: Make, *, reads: Collection[str] = ("gram",)) -> None:
    """Raises if a method breaks one law, a key of ``LAWS``.

    Args:
      law: name of the law.
      make: as in :func:`check_contract`.
      reads: as in :func:`check_contract`.

    Raises:
      AssertionError: with the law, and the numbers.
    """
    arguments.check_choice("law", law, LAWS)
    arguments.check_function("make", make)
    for name in reads:
        arguments.check_choice("reads", name, ("gram", "losses", "gradients"))
    says = " ".join((LAWS[law].__doc__ or "").split())
    try:
        with jax.enable_x64(False):
            LAWS[law](make, frozenset(reads))
    except AssertionError as error:
        raise AssertionError(f"{law}: {says} {error}") from None
    except Exception as error:
        error.add_note(f"While trying the law {law}: {says}")
        raise


def run(method: Any, updates: Any, state: Any) -> tuple[Any, Any]:
    """One update of a method, with losses, and the next state."""
    num_tasks = len(jax.tree.leaves(updates)[0])
    return method.update(updates, state, params(), losses=losses(num_tasks))


@functools.cache
def compiled(make: Make, num_tasks: int = 3) -> tuple[Any, Any]:
    """The method, and its compiled step on updates and state."""
    method = make(num_tasks)
    return method, compiled_fast(lambda updates, state: run(method, updates, state))


def _leaves(tree):
    """Names and arrays of a tree; of random keys, their data."""
    tree = optax.tree.unwrap_random_key_data(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), np.asarray(leaf)


def _check_finite(what, tree):
    for path, x in _leaves(tree):
        assert np.isfinite(x).all(), f"{what}{path} is not finite: {x}"


def _check_close(what, actual, expected, rtol=0.0, atol=0.0):
    for (path, x), (_, y) in zip(_leaves(actual), _leaves(expected)):
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=f"{what}{path}")


def _check_like(what, actual, expected):
    """Structure, shapes and dtypes, weak types included."""
    has, wanted = str(jax.tree.structure(actual)), str(jax.tree.structure(expected))
    assert has == wanted, f"{what} has the structure {has}, expected {wanted}"
    describe = lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)
    ):
        assert describe(x) == describe(y), (
            f"{what}{jax.tree_util.keystr(path)} is {describe(x)}, expected"
            f" {describe(y)}"
        )


def _refused(call, error, what):
    try:
        call()
    except error:
        return
    names = " or ".join(e.__name__ for e in error)
    raise AssertionError(f"{what} raise no {names}")


def initial_state(make, reads):
    """the state is a tree of arrays of fixed dtypes, of which init knows the shapes
    without the values, and which can be donated."""
    del reads
    method = make(3)
    state = method.init(params())
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        weak = isinstance(x, bool | int | float) or getattr(x, "weak_type", False)
        name = jax.tree_util.keystr(path)
        assert not weak, f"state{name} = {x!r} has no fixed dtype: give it one"
    abstract = jax.eval_shape(method.init, params())
    _check_like("the abstract state", abstract, state)
    donate = jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)
    donate(state)
    donate(method.init(params()))  # It must not meet a donated buffer.


def shapes_and_types(make, reads):
    """updates have the shapes and dtypes of the gradients without the task axis, and
    the state keeps its own, so that a step is traced once."""
    del reads
    method, step = compiled(make)
    state = method.init(params())
    traces = []
    for seed in range(3):
        update, new_state = step(stacked(3, seed=seed), state)
        traces.append(step._cache_size())
        _check_like("the update", update, params())
        _check_finite("the update", update)
        _check_like("the new state", new_state, state)
        _check_finite("the new state", new_state)
        state = new_state
    again = traces[-1] - traces[0]
    assert not again, f"it was traced {again} times more after the first step"


def many_tasks_in_low_precision(make, reads):
    """64 tasks in bfloat16 and float16 work, and the dtypes come back."""
    del reads
    method, step = compiled(make, 64)
    dtypes = {"w": "bfloat16", "b": {"c": "float16", "s": "bfloat16"}}
    updates = jax.tree.map(lambda x, d: np.asarray(x, d), stacked(64), dtypes)
    update, state = step(updates, method.init(params()))
    update, state = step(updates, state)
    _check_like("the update", update, jax.tree.map(lambda x: x[0], updates))
    _check_finite("the update", update)
    _check_finite("the state", state)


def one_task(make, reads):
    """one task works."""
    del reads
    method, step = compiled(make, 1)
    update, state = step(stacked(1), method.init(params()))
    update, state = step(stacked(1), state)
    _check_like("the update", update, params())
    _check_finite("the update", update)
    _check_finite("the state", state)


def scans_under_pmap(make, reads):
    """a scan of steps under pmap gives what a loop gives."""
    del reads
    method, step = compiled(make)
    batches = [stacked(3, seed=seed) for seed in range(3)]
    # A leading axis for the only device, then one for the steps.
    together = jax.tree.map(lambda *x: np.stack(x)[None], *batches)
    state = method.init(params())
    scan = jax.pmap(
        lambda u: jax.lax.scan(lambda s, u: run(method, u, s)[::-1], state, u)[1],
        devices=jax.devices()[:1],
    )
    scanned = scan(together)
    for i, updates in enumerate(batches):
        update, state = step(updates, state)
        this = jax.tree.map(lambda x, i=i: np.asarray(x)[0, i], scanned)
        _check_close(f"update {i}", this, update, rtol=1e-4, atol=1e-5)


def same_without_jit(make, reads):
    """it does the same without jit."""
    del reads
    method, step = compiled(make)
    updates, state = stacked(3), method.init(params())
    actual, expected = run(method, updates, state)[0], step(updates, state)[0]
    _check_close("the update", actual, expected, rtol=1e-4, atol=1e-5)


def extra_arguments(make, reads):
    """it accepts losses and extra arguments that it does not know."""
    del reads
    method = make(2)
    state = method.init(params())
    extra = {"losses": losses(2), "value": 1.0, "unheard_of": None}
    update = lambda u: method.update(u, state, params(), **extra)
    try:
        jax.eval_shape(update, stacked(2))
    except TypeError as error:
        raise AssertionError(f"It raised: {error}") from None


def absent_tasks(make, reads):
    """a task whose gradient is zero is absent, and where all are the update is zero."""
    del reads
    method, step = compiled(make)
    absent = jax.tree.map(
        lambda x: np.asarray(x) * (np.arange(3) != 1).reshape(3, *[1] * (x.ndim - 1)),
        stacked(3),
    )
    zero = jax.tree.map(np.zeros_like, absent)
    for case, updates in (("gradient 1 of 3", absent), ("all gradients", zero)):
        update, state = step(updates, method.init(params()))
        update, state = step(updates, state)
        _check_finite(f"With {case} zero: the update", update)
        _check_finite(f"With {case} zero: the state", state)
    nothing = jax.tree.map(jnp.zeros_like, params())
    _check_close("With all gradients zero: the update", update, nothing)


def any_scale(make, reads):
    """gradients of size 1e-12 and 1e12 work in float32."""
    del reads
    method, step = compiled(make)
    for factor in (1e-12, 1e12):
        updates = jax.tree.map(lambda x, f=factor: np.float32(f) * x, stacked(3))
        update, state = step(updates, method.init(params()))
        _check_like("the update", update, params())
        _check_finite(f"At {factor}: the update", update)
        _check_finite(f"At {factor}: the state", state)


def non_finite_gradients(make, reads):
    """the update of gradients that are not finite is not finite, and leaves the state
    as it was."""
    del reads
    method, step = compiled(make)
    _, state = step(stacked(3), method.init(params()))
    for value in (jnp.nan, jnp.inf):
        bad = stacked(3)
        bad["w"] = bad["w"].at[1, 0, 0].set(value)
        update, after = step(bad, state)
        finite = bool(jnp.all(jnp.isfinite(update["w"])))
        assert not finite, f"With {value} in gradient 1: the update is {update['w']}"
        _check_close(f"With {value} in gradient 1: the state", after, state)


def weights_for_a_view(make, reads):
    """handed a GramView, a method that reads no gradients returns its weights, and
    one that reads them raises TypeError."""
    method, step = compiled(make)
    updates, state = stacked(3), method.init(params())

    @compiled_fast
    def weights_of(updates, state):
        view = tasks.GramView(3, lambda: tasks.gram(updates))
        return method.update(view, state, losses=losses(3))[0]

    if "gradients" in reads:
        _refused(lambda: weights_of(updates, state), (TypeError,), "A GramView did")
        return
    weights = np.asarray(weights_of(updates, state))
    assert weights.shape == (3,), f"the weights have shape {weights.shape}"
    expected, _ = step(updates, state)
    actual = jax.tree.map(lambda g: np.tensordot(weights, g, axes=1), updates)
    _check_close("the weighted sum", actual, expected, rtol=1e-5, atol=1e-5)


def needs_losses_only_if_it_reads_them(make, reads):
    """without losses, or with a wrong number of them, a method that reads them raises,
    and another works."""
    method = make(2)

    def call(**extra_args):
        state = method.init(params())
        update = lambda u: method.update(u, state, params(), **extra_args)[0]
        jax.eval_shape(update, stacked(2))

    if "losses" not in reads:
        return call()
    _refused(call, (TypeError,), "Missing losses")
    three = lambda: call(losses=jnp.ones(3))
    _refused(three, (ValueError,), "Three losses for two tasks")


def unstacked_updates(make, reads):
    """updates that are no stacked gradients are refused at trace time."""
    del reads
    method = make(3)
    state = method.init(params())

    def refused(what, updates, params=None):
        call = lambda u: method.update(u, state, params, losses=jnp.ones(3))
        trace = lambda: jax.eval_shape(call, updates)
        _refused(trace, (ValueError, TypeError), what)

    ordinary = {"w": jnp.ones((3, 2))}
    refused("Ordinary gradients", ordinary, ordinary)
    refused("0-d gradients", params())
    refused("Different task axes", {"a": jnp.ones((3, 5)), "b": jnp.ones((2, 5))})
    refused("Updates without arrays", {})
    refused("Integers", {"n": jnp.ones((3, 2), jnp.int32)})


def another_number_of_tasks(make, reads):
    """a method whose state has the size of T refuses another T."""
    del reads
    method = make(7)  # No parameter has an axis of that size.
    state = method.init(params())
    if not any(7 in jnp.shape(x) for x in jax.tree.leaves(state)):
        return
    update = lambda u: method.update(u, state, params(), losses=jnp.ones(2))
    refused = lambda: jax.eval_shape(update, stacked(2))
    _refused(refused, (ValueError,), "Two gradients for a state of seven tasks")


def empty_groups(make, reads):
    """an empty group of optax.partition passes."""
    del reads
    labels = {"w": "shared", "b": "shared"}
    chain = optax.partition({"shared": make(2), "heads": make(2)}, labels)
    state = chain.init(params())
    update, _ = jax.eval_shape(
        lambda u: chain.update(u, state, params(), losses=losses(2)), stacked(2)
    )
    _check_like("the update", update, params())


LAWS: dict[str, Callable[[Make, frozenset[str]], None]] = {
    law.__name__: law
    for law in (
        initial_state,
        extra_arguments,
        shapes_and_types,
        many_tasks_in_low_precision,
        one_task,
        absent_tasks,
        any_scale,
        non_finite_gradients,
        weights_for_a_view,
        needs_losses_only_if_it_reads_them,
        unstacked_updates,
        another_number_of_tasks,
        empty_groups,
        scans_under_pmap,
        same_without_jit,
    )
}
