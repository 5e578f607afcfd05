"""Measured on some parameters, applied to all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl import measure_on, value_and_grad
from tests.common import compiled_fast, flops

N, D, L = 5, 3, 3
RNG = np.random.default_rng(0)
PARAMS = {
    "trunk": [RNG.normal(size=(D, D)).astype(np.float32) for _ in range(L)],
    "heads": RNG.normal(size=(2, D)).astype(np.float32),
}
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = RNG.normal(size=(N, 2)).astype(np.float32)
SHARED = lambda path: "trunk" in path
LAST = lambda path: path == f"trunk/{L - 1}"
MODES = ("auto", "gram", "leafwise", "stacked")


def trunk_fn(params, x):
    for w in params["trunk"]:
        x = jnp.tanh(x @ w)
    return x


def vector_fn(params, x, y):
    return jnp.mean((trunk_fn(params, x) @ params["heads"].T - y) ** 2, axis=0)


def dict_fn(params, x, y):
    losses = vector_fn(params, x, y)
    return {"a": losses[0], "b": losses[1]}


def of_one(params, task, x, y):
    return jnp.mean((trunk_fn(params, x) @ params["heads"][task] - y) ** 2)


def resolve(losses_fn, method=None, args=(X, Y), **options):
    fn = value_and_grad(losses_fn, method or optax_mtl.mgda(), **options)
    return compiled_fast(fn)(PARAMS, fn.init(PARAMS), *args)


def assert_close(actual, expected):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(compare, actual, expected)


def min_norm_of_two(first, second):
    """The weights of MGDA for two tasks, by the formula of Sener and Koltun."""
    share = np.vdot(second - first, second) / np.sum((first - second) ** 2)
    return np.clip([share, 1 - share], 0, 1)


@pytest.fixture(scope="module")
def expected():
    """The weights of the last layer, on all layers; NumPy from the gradients."""
    grads_fn = optax_mtl.value_and_task_grads(vector_fn, shared=SHARED)
    losses, grads = compiled_fast(grads_fn)(PARAMS, X, Y)
    weights = min_norm_of_two(*np.asarray(grads["trunk"][-1], np.float64))
    assert 0 < weights[0] < 1
    everywhere = min_norm_of_two(
        *np.concatenate([np.reshape(g, (2, -1)) for g in grads["trunk"]], axis=1)
    )
    assert abs(everywhere[0] - weights[0]) > 0.02
    trunk = [np.einsum("t,tij->ij", weights, g) for g in grads["trunk"]]
    return losses, {"trunk": trunk, "heads": grads["heads"]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("losses_fn", [vector_fn, dict_fn])
def test_weights_of_the_last_layer_for_all(losses_fn, mode, expected):
    losses, grads, _ = resolve(losses_fn, mode=mode, shared=SHARED, measure=LAST)
    assert_close(grads, expected[1])
    assert_close(jnp.stack(jax.tree.leaves(losses)).ravel(), expected[0])


@pytest.mark.parametrize("mode", ["auto", "leafwise", "stacked"])
def test_with_data_of_their_own(mode, expected):
    args = np.arange(2), np.stack([X, X]), Y.T
    options = {"mode": mode, "shared": SHARED, "measure": LAST, "own_data": True}
    assert_close(resolve(of_one, args=args, **options)[:2], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("losses_fn", [vector_fn, dict_fn])
def test_everything_measured_is_nothing_said(losses_fn, mode):
    options = {"mode": mode, "shared": SHARED, "optimizer": optax.adam(0.1)}
    method = optax_mtl.zero_nonfinite(optax_mtl.nash_mtl())
    plain = resolve(losses_fn, method, **options)
    assert_close(resolve(losses_fn, method, **options, measure=SHARED), plain)


def test_on_stacked_gradients(expected):
    """Around a chain, whose other links see the resolved gradient."""
    grads_fn = optax_mtl.value_and_task_grads(vector_fn, shared=SHARED)
    stacked = compiled_fast(grads_fn)(PARAMS, X, Y)[1]["trunk"]
    chain = optax.chain(optax_mtl.mgda(), optax.scale(2.0), optax.trace(0.9))
    tx = measure_on(chain, [False] * (L - 1) + [True])
    trunk = PARAMS["trunk"]
    out, state = compiled_fast(tx.update)(stacked, tx.init(trunk), trunk)
    assert_close(out, [2 * g for g in expected[1]["trunk"]])
    assert_close(state[2].trace, out)


@pytest.mark.parametrize("mode", MODES)
def test_task_that_does_not_reach_the_measured_part_is_absent(mode):
    def losses_fn(params, x, y):
        early = jnp.mean(jnp.tanh(x @ params["trunk"][0]))
        return jnp.concatenate([vector_fn(params, x, y), early[None]])

    options = {"mode": mode, "shared": SHARED, "measure": LAST}
    without = resolve(vector_fn, **options)[1]
    assert_close(resolve(losses_fn, **options)[1], without)


@pytest.mark.parametrize("named", [False, True])
def test_the_measurement_stops_at_the_measured_layer(named):
    """What it costs beside a plain step does not grow with the depth."""
    num_tasks, size, batch = 8, 256, 256
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    args = shape(batch, size), shape(batch, num_tasks)

    def losses_fn(params, x, y):
        z = trunk_fn(params, x)
        columns = zip(params["heads"], y.T)
        losses = [jnp.mean((z @ head - column) ** 2) for head, column in columns]
        return dict(zip("abcdefgh", losses)) if named else jnp.stack(losses)

    def cost(depth):
        params = {"trunk": [shape(size, size)] * depth, "heads": shape(8, size)}
        last = lambda path: path == f"trunk/{depth - 1}"
        fn = value_and_grad(
            losses_fn, optax_mtl.mgda(), shared=SHARED, measure=last, mode="leafwise"
        )
        total = lambda *args: sum(x.sum() for x in jax.tree.leaves(losses_fn(*args)))
        plain = flops(jax.value_and_grad(total), params, *args)
        return flops(lambda p, *args: fn(p, (), *args), params, *args), plain

    (shallow, plain_shallow), (deep, plain) = cost(4), cost(8)
    assert abs((deep - plain) - (shallow - plain_shallow)) <= 0.01 * plain
    # T gradients of one layer of eight are T / (3 * 8) of a plain step; the inner
    # products and the element-wise operations come on top.
    assert deep <= (1 + num_tasks / 24 + 0.13) * plain


def gradient_reader(**options):
    return resolve(vector_fn, optax_mtl.graddrop(), shared=SHARED, **options)


mgda = optax_mtl.mgda()
MESSAGES = {
    "nothing": (
        lambda: resolve(vector_fn, measure=lambda path: "encoder" in path),
        "measure marks none of the parameters.*leave it out",
    ),
    "nothing, stacked": (
        lambda: resolve(vector_fn, measure=lambda path: False, mode="stacked"),
        "measure marks none of the parameters.*leave it out",
    ),
    "a head": (
        lambda: resolve(vector_fn, shared=SHARED, measure=lambda path: "heads" in path),
        r"measure marks params\['heads'\], which is a head.*mark some of those",
    ),
    "a head among others": (
        lambda: resolve(vector_fn, shared=SHARED, measure=True, mode="stacked"),
        r"measure marks params\['heads'\], which is a head.*mark some of those",
    ),
    "a head, own data": (
        lambda: resolve(
            of_one,
            args=(np.arange(2), np.stack([X, X]), Y.T),
            shared=SHARED,
            measure={"trunk": False, "heads": True},
            own_data=True,
        ),
        r"measure marks params\['heads'\], which is a head.*mark some of those",
    ),
    "another structure": (
        lambda: resolve(vector_fn, measure={"trunks": True}),
        "measure should have the structure of the parameters",
    ),
    "a method that reads gradients": (
        lambda: gradient_reader(measure=LAST, mode="stacked"),
        "measure_on works with the weights.*reads 'gram' or 'losses'",
    ),
    "a method that reads gradients, as it comes": (
        lambda: gradient_reader(measure=LAST),
        "measure_on works with the weights.*reads 'gram' or 'losses'",
    ),
    "measure_on nothing": (
        lambda: measure_on(mgda, lambda path: False).update(np.eye(2), (), np.ones(2)),
        "the mask of measure_on marks none",
    ),
    "gradients under update_every": (
        lambda: resolve(
            vector_fn, optax_mtl.update_every(optax_mtl.trimmed_mean(), 2, 2)
        ),
        "update_every works with the weights.*reads 'gram' or 'losses'",
    ),
    "gradients under smooth_weights": (
        lambda: resolve(
            vector_fn,
            optax_mtl.smooth_weights(optax_mtl.trimmed_mean(), 2),
            mode="stacked",
        ),
        "smooth_weights works with the weights.*reads 'gram' or 'losses'",
    ),
    "measure_on where only inner products are": (
        lambda: resolve(vector_fn, measure_on(mgda, LAST), mode="gram"),
        "measure_on reads the task gradients.*mode='stacked'",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_errors_name_the_remedy(case):
    call, message = MESSAGES[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
