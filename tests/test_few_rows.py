"""Tasks of few rows: the Gram matrix without the gradients that it is of.

Expected values come from the gradients themselves, by ``jax.grad`` for one task after
the other, multiplied in float64.
"""

from functools import cache

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from optax_mtl.gradients.few_rows import gram_of_tasks
from tests.common import compiled_fast, flops, temporary_memory

T, D = 7, 16
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32) / 4
X, SEQUENCES = draw(T, D), draw(T, 3, D)
WORDS = RNG.integers(0, 5, size=(T, 3))
IMAGES = draw(T, 6, 6, 3)
MLP = {"first": draw(D, 20), "bias": draw(1, 20), "last": draw(20, 12)}

layer = jax.jit(lambda w, x: jnp.tanh(x @ w))  # One inner program for all layers.


@jax.custom_vjp
def scaled_product(x, w):
    return x @ w


def _forward(x, w):
    return x @ w, (x, w)


def _backward(kept, slope):
    return slope @ kept[1].T, 2 * jnp.outer(kept[0], slope)


scaled_product.defvjp(_forward, _backward)


def mlp(p, x):
    return jnp.sum(
        jnp.tanh(layer(p["first"], jnp.atleast_2d(x)) + p["bias"]) @ p["last"]
    )


def attention(p, x):
    """Two heads: matrices of three axes, and a transposed one."""
    q, k = (jnp.einsum("nd,dhe->nhe", x, p[name]) for name in ("query", "key"))
    share = jax.nn.softmax(jnp.einsum("nhe,mhe->hnm", q, k))
    mixed = jnp.einsum("hnm,mhe->nhe", share, jnp.einsum("dhe,nd->nhe", p["value"], x))
    return jnp.sum(jnp.einsum("nhe,dhe->nd", mixed, p["out"]) ** 3)


def convolved(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(
        x[None], p["kernel"], (1, 1), "SAME", dimension_numbers=dims
    )
    return jnp.sum(jnp.tanh(z.mean((0, 1, 2)) @ p["last"]))


def scanned(p, x):
    z, _ = jax.lax.scan(lambda z, w: (jnp.tanh(z @ w), None), x, p["layers"])
    return jnp.sum(layer(p["last"], z))


# Each with its parameters, its data, and the parameters of T gradients.
CASES = {
    "layers and a bias": (mlp, MLP, X, {"bias"}),
    "the same with a sequence": (mlp, MLP, SEQUENCES, {"bias"}),
    "a program in a program, twice": (
        lambda p, x: jnp.sum(jax.jit(lambda x: layer(p["b"], layer(p["a"], x)))(x)),
        {"a": draw(D, D), "b": draw(D, 20)},
        X,
        set(),
    ),
    "attention": (
        attention,
        {n: draw(D, 2, 8) for n in ("query", "key", "value", "out")},
        SEQUENCES,
        set(),
    ),
    "used twice": (
        lambda p, x: jnp.sum(layer(p["w"], layer(p["w"], x)) * p["scale"]),
        {"w": draw(D, D), "scale": draw(D)},
        X,
        {"w", "scale"},
    ),
    "encoder and its transpose": (
        lambda p, x: jnp.sum((layer(p["w"], x) @ p["w"].T - x) ** 2),
        {"w": draw(D, 20)},
        X,
        {"w"},
    ),
    "penalised": (
        lambda p, x: jnp.sum(layer(p["w"], x)) + jnp.sum(p["w"] ** 2),
        {"w": draw(D, 20)},
        X,
        {"w"},
    ),
    "reshaped and transposed": (
        lambda p, x: jnp.sum(layer(p["w"].reshape(20, D).T, x)),
        {"w": draw(2, 10, D)},
        X,
        set(),
    ),
    "two matrices": (
        lambda p, x: jnp.sum(layer(p["a"] @ p["b"], x)),
        {"a": draw(D, 2), "b": draw(2, 20)},
        X,
        {"a", "b"},
    ),
    "looked up": (
        lambda p, x: jnp.sum(layer(p["last"], p["words"][x])),
        {"words": draw(5, D), "last": draw(D, 20)},
        WORDS,
        {"words"},
    ),
    "convolved": (
        convolved,
        {"kernel": draw(3, 3, 3, D), "last": draw(D, 20)},
        IMAGES,
        {"kernel"},
    ),
    "scanned": (
        scanned,
        {"layers": draw(2, D, D), "last": draw(D, 20)},
        X,
        {"layers"},
    ),
    "a checkpoint": (
        lambda p, x: jnp.sum(layer(p["b"], jax.checkpoint(layer)(p["a"], x))),
        {"a": draw(D, 20), "b": draw(20, 12)},
        X,
        {"a"},
    ),
    "a derivative of its own": (
        lambda p, x: jnp.sum(layer(p["b"], scaled_product(x, p["a"]))),
        {"a": draw(D, 20), "b": draw(20, 12)},
        X,
        {"a"},
    ),
    "one matrix for each row": (
        lambda p, x: jnp.sum(jnp.tanh(jnp.einsum("nd,nde->ne", x, p["w"]))),
        {"w": draw(3, D, 20)},
        SEQUENCES,
        {"w"},
    ),
    "a branch": (
        lambda p, x: jax.lax.cond(
            x[0] > 0, lambda: jnp.sum(x @ p["w"]), lambda: jnp.sum(x @ p["w"]) ** 2
        ),
        {"w": draw(D, 20)},
        X,
        {"w"},
    ),
    "used again by what is left out": (
        lambda p, x: (jnp.sum(p["w"] ** 2), jnp.sum(layer(p["w"], x)))[1],
        {"w": draw(D, 20)},
        X,
        set(),
    ),
    "empty": (
        lambda p, x: jnp.sum(layer(p["w"], x[:0])) + jnp.sum(x @ p["v"]),
        {"w": draw(0, 20), "v": draw(D, 0)},
        X,
        {"w", "v"},
    ),
    "left out, and returned": (
        lambda p, x: p["loss"].reshape(()),
        {"loss": draw(1, 1), "unused": draw(D, 20)},
        X,
        {"loss", "unused"},
    ),
    "complex": (
        lambda p, x: jnp.sum(jnp.abs((x * (1 + 2j)) @ p["w"] @ p["v"] - 1j) ** 2),
        {"w": draw(D, 20) + 1j * draw(D, 20), "v": draw(20, 12)},
        SEQUENCES,
        {"v"},
    ),
    "many rows": (mlp, MLP, draw(T, 40, D), {"first", "bias", "last"}),
}


def gradients(case):
    loss_fn, params, x, _ = CASES[case]
    return jax.vmap(jax.grad(loss_fn), (None, 0))(params, x)


def gram_in_float64(gradients):
    wide = lambda x: np.asarray(x).reshape(T, -1).astype(np.complex128)
    return sum((wide(x) @ wide(x).conj().T).real for x in jax.tree.leaves(gradients))


@cache
def all_cases():
    """Gram matrices and gradients of all cases, in one program."""

    def run():
        grams = {n: gram_of_tasks(f, p, (x,)) for n, (f, p, x, _) in CASES.items()}
        return grams, {name: gradients(name) for name in CASES}

    return compiled_fast(run)()


@pytest.mark.parametrize("case", CASES)
def test_gram_matrix_of_the_gradients(case):
    grams, gradients = all_cases()
    expected = gram_in_float64(gradients[case])
    np.testing.assert_allclose(grams[case], expected, rtol=1e-4, atol=1e-6)


def shapes_in(jaxpr):
    """Shapes of all that a program computes, that of its parts included."""
    for eqn in jaxpr.eqns:
        yield from (x.aval.shape for x in eqn.outvars)
        for part in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(part, "eqns"):
                yield from shapes_in(part)


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_are_taken(case):
    loss_fn, params, x, taken = CASES[case]
    program = jax.make_jaxpr(lambda p: gram_of_tasks(loss_fn, p, (x,)))(params)
    shapes = set(shapes_in(program.jaxpr))
    assert {name for name, w in params.items() if (T, *w.shape) in shapes} == taken


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("cast", ["in the model", "before it"])
def test_low_precision(dtype, cast):
    """Within what rounding each entry of the gradients makes of their products."""
    half = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    loss_fn = mlp if cast == "before it" else lambda p, x: mlp(half(p), x.astype(dtype))
    inputs = (MLP, X) if cast == "in the model" else half((MLP, X))

    def run(params, x):
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, x)
        gram = gram_of_tasks(loss_fn, params, (x,))
        return gram, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

    gram, gradients = compiled_fast(run)(*inputs)
    assert gram.dtype == jnp.float32
    expected = gram_in_float64(gradients)
    norms = np.sqrt(np.diag(expected))
    error = np.abs(gram - expected) / np.outer(norms, norms)
    assert np.max(error) < 4 * jnp.finfo(dtype).eps


def test_what_is_not_finite_stays_in_its_row_and_column():
    x = np.where(np.arange(T)[:, None] == 2, np.inf, X)
    gram = compiled_fast(lambda x: gram_of_tasks(mlp, MLP, (x,)))(x)
    others = np.arange(T) != 2
    assert np.all(np.isfinite(gram) == np.outer(others, others))


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.LayerNorm()(flax.linen.DenseGeneral((2, 8), name="trunk")(x))
        return flax.linen.DenseGeneral(20, axis=(-2, -1))(flax.linen.gelu(x))


class Nnx(nnx.Module):
    def __init__(self):
        self.trunk = nnx.Linear(D, 20, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(20, 12, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(nnx.relu(self.trunk(x)))


def models():
    """Functions of parameters and inputs, and their parameters."""
    linen = Linen()
    yield linen.apply, linen.init(jax.random.key(0), X)
    graph, state = nnx.split(Nnx())
    yield (lambda p, x: nnx.merge(graph, p)(x)), nnx.to_pure_dict(state)
    apply = lambda p, x: jnp.tanh(x @ p["trunk"]) @ p["last"]
    yield apply, {"trunk": MLP["first"], "last": MLP["last"]}


OPTIONS = {
    "all": {},
    "shared": {"shared": lambda path: "trunk" in path},
    "measured": {"measure": lambda path: "trunk" in path},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_resolved_as_with_stacked_gradients(case):
    def run(x):
        results = []
        for apply, params in models():
            loss_fn = lambda p, x, apply=apply: (jnp.sum(apply(p, x) ** 2), x)
            for mode in ("leafwise", "stacked"):
                fn = optax_mtl.value_and_grad(
                    loss_fn,
                    optax_mtl.upgrad(),
                    True,
                    own_data=True,
                    mode=mode,
                    **OPTIONS[case],
                )
                results.append(fn(params, fn.init(params), x))
        return results

    results = compiled_fast(run)(X)
    for leafwise, stacked in zip(results[::2], results[1::2], strict=True):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, leafwise, stacked)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tasks_and_rows_over_devices(kind):
    mesh = jax.make_mesh((2, 2), ("tasks", "rows"), axis_types=(kind,) * 2)
    x = draw(8, 2, D)
    gram = lambda params, x: gram_of_tasks(mlp, params, (x,))
    expected = compiled_fast(gram)(MLP, x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("tasks", "rows")))
        params = jax.device_put(MLP, NamedSharding(mesh, P()))
        actual = jax.jit(gram)(params, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("varying", [False, True])
def test_rows_over_devices_by_hand(varying):
    """The gradients of parameters that vary over devices are not summed over these."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    x = draw(T, 2, D)

    def loss_fn(params, x):
        return jax.lax.psum(mlp(params, x), "rows")

    def run(params, x):
        if varying:
            params = jax.lax.pcast(params, "rows", to="varying")
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, x)
        both = gram_of_tasks(loss_fn, params, (x,)), optax_mtl.gram(gradients)
        return [jax.lax.psum(gram, "rows") if varying else gram for gram in both]

    specs = {"in_specs": (P(), P(None, "rows")), "out_specs": P()}
    actual, expected = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(MLP, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def of_layers(params, x, y):
    for w in params["trunk"]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params["last"] - y) ** 2)


@pytest.mark.parametrize("num_tasks", [10, 64])
def test_one_objective_for_each_example_costs_less_than_two_plain_steps(num_tasks):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {"trunk": [shape(256, 256)] * 4, "last": shape(256, 8)}
    args = shape(num_tasks, 256), shape(num_tasks, 8)
    resolve = optax_mtl.value_and_grad(
        of_layers, optax_mtl.mgda(), own_data=True, mode="leafwise"
    )
    step = lambda params, *args: resolve(params, (), *args)[1]
    total = lambda params, *args: jax.vmap(of_layers, (None, 0, 0))(params, *args).sum()
    plain = jax.value_and_grad(total)
    assert flops(step, params, *args) <= 1.7 * flops(plain, params, *args)
    gradients = 4 * num_tasks * 256**2  # Of one layer.
    assert temporary_memory(step, params, *args) < 0.3 * gradients
