"""Conflicts resolved inside the model: what comes back through split_tasks."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from optax_mtl import split_tasks
from tests.common import compiled_fast, flops

T, N, D = 3, 16, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "trunk": RNG.normal(size=(D, D)).astype(np.float32),
    "heads": RNG.normal(size=(T, D)).astype(np.float32),
}
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = RNG.normal(size=(N, T)).astype(np.float32)
RANDOM = {
    "random_weights",
    "pcgrad",
    "graddrop",
    "dare",
}  # Their state is that of a key.
# Neither a running state nor losses.
STATELESS = [
    name
    for name, row in optax_mtl.METHODS.items()
    if "losses" not in row.reads
    and (name in RANDOM or not jax.tree.leaves(row.make(T).init(np.zeros(2))))
]


def trunk_fn(params, x, *_):
    return jnp.tanh(x @ params["trunk"])


def heads_fn(params, z, x, y):
    return jnp.mean((z @ params["heads"].T - y) ** 2, axis=0)


def loss_fn(params, x, y, method, **options):
    """A plain sum, over heads behind one split."""
    copies = split_tasks(trunk_fn(params, x), T, method, **options)
    loss = lambda z, i: jnp.mean((z @ params["heads"][i] - y[:, i]) ** 2)
    return sum(loss(z, i) for i, z in enumerate(copies))


def assert_close(actual, expected, rtol=1e-5):
    compare = partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
    jax.tree.map(compare, actual, expected)


@cache
def plain(name):
    method = optax_mtl.get(name, T)
    return compiled_fast(jax.grad(partial(loss_fn, method=method)))(PARAMS, X, Y)


@pytest.mark.parametrize("name", STATELESS)
def test_as_resolved_at_the_features_by_hand(name):
    method = optax_mtl.get(name, T)
    resolve = optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, method)

    @compiled_fast
    def by_hand(params, x, y):
        return resolve(params, resolve.init(params, x, y), x, y)[1]

    assert_close(plain(name), by_hand(PARAMS, X, Y))


@pytest.mark.parametrize("name", sorted(set(optax_mtl.METHODS) - set(STATELESS)))
def test_all_others_are_refused(name):
    with pytest.raises(TypeError, match="value_and_grad_at_features"):
        split_tasks(X, T, optax_mtl.get(name, T))


def test_features_of_any_kind():
    """A tree with bfloat16, whole numbers and holes; the numbers of a dict of tasks."""
    z = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": (jnp.arange(3.0), None)}
    z["mask"] = jnp.arange(2)
    weights = {"left": 2.0, "right": 3.0}

    def loss(floats, mask):
        names = ["right", "left"]  # In the order of the names, as losses are.
        out = split_tasks(floats | {"mask": mask}, names, optax_mtl.linear(weights))
        assert list(out) == sorted(names)
        assert out["left"]["b"][1] is None
        of = lambda z: jnp.sum(z["a"].astype(jnp.float32) * z["mask"][:, None])
        return of(out["left"]) - 10 * (of(out["right"]) + jnp.sum(out["right"]["b"][0]))

    grads = jax.grad(loss)({"a": z["a"], "b": z["b"]}, z["mask"])
    assert grads["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads["a"], [[0] * 3, [2 - 30] * 3])
    np.testing.assert_array_equal(grads["b"][0], [-30.0] * 3)


def test_nothing_is_copied_forward():
    z = jnp.ones(3)
    assert all(copy is z for copy in split_tasks(z, 2, optax_mtl.mgda()))
    out = jax.make_jaxpr(lambda z: split_tasks(z, T, optax_mtl.upgrad()))(z)
    lines = jax.jit(lambda z: split_tasks(z, T, optax_mtl.upgrad())).lower(z).as_text()
    assert len(out.out_avals) == T
    assert "stack" not in lines and "concatenate" not in lines


def test_task_without_a_head_is_absent():
    def loss(z, method, count):
        copies = split_tasks(z, count, method)
        return jnp.sum(copies[0] ** 2) - 2 * jnp.sum(copies[1])

    z = jnp.array([1.0, 3.0])
    alone, beside = (jax.grad(loss)(z, optax_mtl.mgda(), count) for count in (2, 3))
    np.testing.assert_allclose(beside, alone, rtol=1e-6)


def test_composes_with_transformations():
    """A traced key, inside a scan inside jax.checkpoint inside vmap."""

    def loss(w, x, keys):
        @jax.checkpoint
        def layer(z, inputs):
            w, key = inputs
            method = optax_mtl.random_weights(key=key)
            a, b = split_tasks(jnp.tanh(w * z), 2, method)
            return a, jnp.sum(b**2)

        z, losses = jax.lax.scan(layer, x, (w, keys))
        return losses.sum() + z.sum()

    def by_hand(w, x, keys):
        """Weighted by a stop of the gradient, layer by layer."""
        z, total = x, 0.0
        for i in range(len(w)):
            z = jnp.tanh(w[i] * z)
            method = optax_mtl.random_weights(key=keys[i])
            weights, _ = method.update(jnp.eye(2), method.init(None))
            a, b = (
                s * z + jax.lax.stop_gradient(z - s * z)
                for s in (weights[0], weights[1])
            )
            z, total = a, total + jnp.sum(b**2)
        return total + z.sum()

    w = np.array([0.5, 1.0, -2.0], np.float32)
    x = np.array([[1.0, 2], [3, -1]], np.float32)
    keys = jax.random.split(jax.random.key(0), (2, 3))
    run = lambda f: compiled_fast(jax.vmap(jax.grad(f), (None, 0, 0)))(w, x, keys)
    actual, expected = run(loss), run(by_hand)
    assert_close(actual, expected)
    assert not np.allclose(actual, actual[::-1])


@pytest.fixture(params=["upgrad", "pcgrad"])
def name(request):
    return request.param


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gram_matrix_of_the_whole_batch_on_eight_devices(name, kind):
    method = optax_mtl.get(name, T)
    grad = jax.grad(partial(loss_fn, method=method, axis_name="data"))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharded = jax.device_put((X, Y), NamedSharding(mesh, P("data")))

    @jax.jit
    @partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def step(params, x, y):
        params = jax.lax.pcast(params, "data", to="varying")
        return jax.lax.pmean(grad(params, x, y), "data")

    assert_close(step(PARAMS, *sharded), plain(name))
    with jax.set_mesh(mesh):
        whole = jax.jit(jax.grad(partial(loss_fn, method=method)))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        assert_close(whole(params, *sharded), plain(name))


def test_one_all_reduce_of_the_gram_matrix():
    grad = jax.grad(
        lambda z, y: jnp.sum(
            jnp.stack(split_tasks(z, T, optax_mtl.upgrad(), axis_name="data")) * y
        )
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(
        grad, mesh=mesh, in_specs=(P("data"), P(None, "data")), out_specs=P("data")
    )
    text = jax.jit(step).lower(np.ones((N, D)), np.ones((T, N, D))).as_text()
    reduced = re.findall(r"all_reduce.*?->\s*(tensor<\S*>)", text, re.DOTALL)
    assert reduced == [f"tensor<{T}x{T}xf32>"]


def test_under_pmap():
    grad = jax.grad(
        partial(loss_fn, method=optax_mtl.get("upgrad", T), axis_name="data")
    )
    step = jax.pmap(
        lambda *args: jax.lax.pmean(grad(*args), "data"), "data", in_axes=(None, 0, 0)
    )
    out = step(PARAMS, X.reshape(8, 2, D), Y.reshape(8, 2, T))
    assert_close(jax.tree.map(lambda g: g[3], out), plain("upgrad"))


def test_costs_what_the_plain_sum_costs():
    tasks, size = 8, 256
    params = {
        "trunk": np.ones((4, size, size), np.float32),
        "heads": np.ones((tasks, size), np.float32),
    }

    def loss(params, x, method):
        z, _ = jax.lax.scan(
            lambda z, w: (jnp.tanh(z @ w), None), x, params["trunk"], unroll=4
        )
        copies = split_tasks(z, tasks, method) if method else (z,) * tasks
        return sum(
            jnp.mean((z @ params["heads"][i]) ** 2) for i, z in enumerate(copies)
        )

    cost = lambda method: flops(
        jax.grad(partial(loss, method=method)), params, np.ones((128, size), np.float32)
    )
    assert cost(optax_mtl.upgrad()) <= 1.05 * cost(None)


z = np.ones((2, 3), np.float32)
MESSAGES = {
    "names that repeat": (
        lambda: split_tasks(z, ["a", "b", "a"], optax_mtl.mgda()),
        "names 'a' more than once; give each task a name of its own",
    ),
    "one name": (
        lambda: split_tasks(z, "ab", optax_mtl.mgda()),
        "num_tasks is 'ab'; it should be the number of tasks, or a sequence",
    ),
    "no number": (
        lambda: split_tasks(z, 2.0, optax_mtl.mgda()),
        "num_tasks is 2.0; it should be the number of tasks, or a sequence",
    ),
    "no task": (lambda: split_tasks(z, 0, optax_mtl.mgda()), "num_tasks is 0"),
    "running state": (
        lambda: split_tasks(z, 2, optax_mtl.gradvac(2)),
        r"running one, state.targets of shape \(2, 2\).*value_and_grad_at_features",
    ),
    "schedule after the method": (
        lambda: split_tasks(
            z,
            2,
            optax.chain(optax_mtl.pcgrad(), optax.scale_by_schedule(lambda i: i)),
        ),
        r"running one, state\[1\].count.*value_and_grad_at_features",
    ),
    "losses": (
        lambda: split_tasks(z, 2, optax_mtl.gls()),
        "but this method reads them.*value_and_grad_at_features",
    ),
    "losses by name": (
        lambda: split_tasks(z, ["a", "b"], optax_mtl.zero_nonfinite(optax_mtl.gls())),
        "but this method reads them.*value_and_grad_at_features",
    ),
    "no method": (
        lambda: split_tasks(z, 2, optax.sgd(1.0)),
        "begin the chain with a method",
    ),
    "whole numbers": (
        lambda: split_tasks(jnp.arange(3), 2, optax_mtl.mgda()),
        "needs features with a floating-point array",
    ),
    "unknown name": (
        lambda: split_tasks(z, ["a", "b"], optax_mtl.linear({"a": 1.0, "c": 1.0})),
        "weights names the task 'c', but the tasks are 'a', 'b'",
    ),
    "method that reads gradients, over devices": (
        lambda: jax.vmap(
            lambda z: split_tasks(z, 2, optax_mtl.graddrop(), axis_name="data"),
            axis_name="data",
        )(z),
        "(?s)reads the task gradients themselves; take one.*Without axis_name",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_errors_name_the_remedy(case):
    call, message = MESSAGES[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("names", [2, ["a", "b"]])
def test_what_looks_at_losses_only_if_there_are_any(names):
    method = optax_mtl.zero_nonfinite(optax_mtl.upgrad())
    assert len(split_tasks(z, names, method)) == 2
