"""Tasks that are not finite are left out, and the others resolved without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

PARAMS = {"w": np.float32([0.3, 0.5, -0.2]), "b": np.float32(0.1)}
METHODS = {
    "upgrad": lambda count: optax_mtl.upgrad(),
    "gls": lambda count: optax_mtl.gls(),
    "imtl": optax_mtl.imtl,
    "linear": lambda count: optax_mtl.linear(),
    "chain": lambda count: optax.chain(optax_mtl.imtl_g(), optax.sgd(0.5)),
}


def losses_fn(params, x):
    """Three losses; at x = 0 the second is finite and has no finite gradient."""
    h = jnp.tanh(params["w"] @ np.float32([[1, 2], [0, 1], [1, -1]]) + params["b"])
    return {
        "a": jnp.sum(h**2) + params["w"][0] ** 2,
        "b": 1 + jnp.sqrt(jnp.abs(x * h[0])),
        "c": jnp.sum((params["w"] - 2) ** 2),
    }


def without_b(params, x):
    losses = losses_fn(params, x)
    return {"a": losses["a"], "c": losses["c"]}


@functools.cache
def resolver(name, mode, guarded=True, fn=losses_fn):
    method = METHODS[name](3 if fn is losses_fn else 2)
    method = optax_mtl.zero_nonfinite(method) if guarded else method
    resolve = optax_mtl.value_and_grad(fn, method, mode=mode)
    return resolve.init(PARAMS), jax.jit(resolve)


def gradient(*args, x, **kwargs):
    state, resolve = resolver(*args, **kwargs)
    _, grads, after = resolve(PARAMS, state, np.float32(x))
    return grads, state, after


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
@pytest.mark.parametrize("name", METHODS)
def test_others_are_resolved_without_it(name, mode):
    found, _, after = gradient(name, mode, x=0)
    expected, _, others = gradient(name, "stacked", guarded=False, fn=without_b, x=0)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5)
    jax.tree.map(close, found, expected)
    kept = [
        np.asarray(x)[[0, 2]] if np.shape(x) == (3,) else x
        for x in jax.tree.leaves(after)
    ]
    jax.tree.map(close, kept, jax.tree.leaves(others))


@pytest.mark.parametrize("mode", ["leafwise", "stacked", "gram"])
@pytest.mark.parametrize("name", ["imtl", "chain"])
def test_nothing_changes_where_all_are_finite(name, mode):
    found, _, after = gradient(name, mode, x=1)
    expected, _, state = gradient(name, mode, guarded=False, x=1)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5)
    jax.tree.map(close, (found, after), (expected, state))


def in_a_vector(params, x):
    return jnp.stack(list(losses_fn(params, x).values()))


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_losses_in_a_vector_are_spoiled_together(mode):
    """All derivatives meet the one that is not finite: 0 times infinity."""
    method = optax_mtl.zero_nonfinite(optax_mtl.imtl(3))
    resolve = optax_mtl.value_and_grad(in_a_vector, method, mode=mode)
    state = resolve.init(PARAMS)
    _, grads, after = jax.jit(resolve)(PARAMS, state, np.float32(0))
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("names", ["abc", None])
def test_losses_that_are_not_finite_are_absent_too(names):
    """In a dict or a vector; with a gradient that is finite, and the reverse."""
    method = optax_mtl.zero_nonfinite(optax_mtl.dwa(3, window=1))
    eye, state = jnp.eye(3), method.init(jnp.zeros(3))
    form = lambda v: dict(zip(names, v, strict=True)) if names else jnp.array(v)
    bad = eye.at[2, 0].set(jnp.inf)
    update, state = method.update(bad, state, losses=form([1.0, jnp.nan, 2.0]))
    np.testing.assert_array_equal(update, [1, 0, 0])
    np.testing.assert_array_equal(state.seen, [1, 0, 0])


def test_a_scaled_view_still_knows_the_way_around():
    rows = np.float32([[1, 2], [np.nan, 0], [3, 4]])
    some = lambda weights, keep: weights @ jnp.where(keep[:, None], rows, 0)
    view = optax_mtl.GramView(3, lambda: rows @ rows.T, lambda w: w @ rows, some)
    chain = optax.chain(
        optax_mtl.log_losses(), optax_mtl.zero_nonfinite(), optax_mtl.linear()
    )
    update, _ = chain.update(view, chain.init(None), losses=jnp.array([2.0, 1, 0.5]))
    np.testing.assert_array_equal(update, rows[0] / 2 + rows[2] / 0.5)


def test_what_is_not_finite_in_a_named_task_stays_there():
    """In each way that goes from task to task; its head alone has it as well."""
    names = ["a", "b", "c"]
    params = {"trunk": np.float32([1, 2]), "heads": dict.fromkeys(names, np.float32(1))}
    x = np.arange(1, 7, dtype=np.float32)[:, None] * np.float32([1, -1])

    def losses_fn(params, x):
        x = {"a": x, "b": jnp.where(x > 4, jnp.nan, x), "c": 2 * x}
        out = {name: params["heads"][name] * (x[name] @ params["trunk"]) for name in x}
        return jax.tree.map(jnp.mean, out)

    shared = {"trunk": True, "heads": False}
    ones = lambda x: dict.fromkeys(names, 1.0)
    options = {"shared": shared}
    fns = {
        "stacked": optax_mtl.value_and_task_grads(losses_fn, **options),
        "in turn": optax_mtl.value_and_task_grads(
            losses_fn, sequential=True, **options
        ),
        "accumulated": optax_mtl.accumulate_task_grads(losses_fn, 3, **options),
        "counted": optax_mtl.accumulate_task_grads(
            losses_fn, 3, num_labels=ones, **options
        ),
    }
    found = jax.jit(lambda: {name: fn(params, x) for name, fn in fns.items()})()
    mean = x.mean(axis=0)
    for name, (losses, grads) in found.items():
        assert np.isnan(losses["b"]) and np.isnan(grads["heads"]["b"]), name
        # By hand: the gradient of mean(h x . w) is h mean(x), and that of h the loss.
        trunk = grads["trunk"]
        np.testing.assert_allclose(trunk[0], mean, rtol=1e-6)
        assert np.isnan(trunk[1]).any()
        np.testing.assert_allclose(trunk[2], 2 * mean, rtol=1e-6)
        for task, times in (("a", 1), ("c", 2)):
            expected = times * mean @ params["trunk"]
            np.testing.assert_allclose(grads["heads"][task], expected, rtol=1e-6)
            np.testing.assert_allclose(losses[task], expected, rtol=1e-6)
