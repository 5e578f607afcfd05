"""Gram matrix and combination: values, and every way to distribute the leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from optax_mtl import tasks

ARRAY = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
WEIGHTS = np.array([0.5, -1.0, 2.0], np.float32)
GRAM = np.einsum("tab,sab->ts", ARRAY.astype(float), ARRAY.astype(float))
COMBINED = np.einsum("t,tab->ab", WEIGHTS.astype(float), ARRAY.astype(float))


def both(x):
    return optax_mtl.gram({"x": x}), optax_mtl.combine(jnp.asarray(WEIGHTS), {"x": x})


def assert_right(out, rtol=1e-5):
    gram, combined = out
    np.testing.assert_allclose(gram, GRAM, rtol=rtol, atol=rtol * 100)
    np.testing.assert_allclose(combined["x"], COMBINED, rtol=rtol, atol=rtol * 10)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_values(transform):
    assert_right(transform(both)(jnp.asarray(ARRAY)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_scalar_leaves_of_several_dtypes(transform):
    updates = {
        "scalar": jnp.array([1.0, 2, 3]),
        "half": jnp.array([[256.0], [0.5], [1]], jnp.bfloat16),
        "empty": jnp.zeros((3, 0)),
        "none": None,
    }
    gram = transform(optax_mtl.gram)(updates)
    half = np.array([256, 0.5, 1])
    expected = np.outer([1, 2, 3], [1, 2, 3]) + np.outer(half, half)
    assert gram.dtype == jnp.float32
    np.testing.assert_allclose(gram, expected)


def test_low_precision_is_accumulated_in_float32():
    # The sum of squares of 66048 ones is not a bfloat16 and overflows float16.
    for dtype in (jnp.bfloat16, jnp.float16):
        gram = optax_mtl.gram(jnp.ones((2, 66048), dtype))
        np.testing.assert_array_equal(gram, np.full((2, 2), 66048))


def test_float64_and_complex():
    with jax.enable_x64(True):
        assert optax_mtl.gram(jnp.ones((2, 3))).dtype == jnp.float64
    x = ARRAY[:, :, :8] + 1j * ARRAY[:, :, 8:]
    np.testing.assert_allclose(optax_mtl.gram(jnp.asarray(x)), GRAM, rtol=1e-4)


def test_vmap_and_grad():
    batch = jnp.stack([jnp.asarray(ARRAY)] * 2)
    gram, combined = jax.jit(jax.vmap(both))(batch)
    assert_right((gram[1], {"x": combined["x"][1]}))
    gradient = jax.grad(lambda x: optax_mtl.gram(x).sum())(jnp.asarray(ARRAY))
    expected = np.broadcast_to(2 * ARRAY.sum(axis=0), ARRAY.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [None, 7, 16, 64])
def test_one_device(monkeypatch, columns):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    if columns:  # In blocks of so many; otherwise in one piece.
        for name in ("_BLOCK_ELEMENTS", "_MAX_IN_ONE_PIECE"):
            monkeypatch.setattr(tasks, name, columns * len(ARRAY))
    x = jnp.asarray(ARRAY)
    # A new function, so that nothing traced for several devices is used again.
    assert_right(jax.jit(lambda x: both(x))(x))
    gram, first_row = tasks.inner_products({"x": x}, {"x": x}, {"x": x[:1]})
    np.testing.assert_allclose(gram, GRAM, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(first_row, GRAM[:, :1], rtol=1e-5, atol=1e-4)


def test_scalars_and_empty_leaves_on_one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    gram = optax_mtl.gram([jnp.array([1.0, 2, 3]), jnp.zeros((3, 0))])
    np.testing.assert_allclose(gram, np.outer([1, 2, 3], [1, 2, 3]))


SPECS = [P(None, "data"), P(None, None, "data"), P(None, "data", "model"), P()]


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("context", ["none", "set_mesh"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sharded(spec, axis_type, context, transform):
    devices = mesh(axis_type)
    x = jax.device_put(ARRAY, NamedSharding(devices, spec))
    if context == "none":
        assert_right(transform(both)(x))
    else:
        with jax.set_mesh(devices):
            assert_right(transform(both)(x))


def test_mixed_mesh():
    types = (AxisType.Explicit, AxisType.Auto)
    devices = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    x = jax.device_put(ARRAY, NamedSharding(devices, P(None, "data", "model")))
    with jax.set_mesh(devices):
        assert_right(jax.jit(both)(x))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map(axis_type):
    devices = mesh(axis_type)
    specs = P(None, "data")
    x = jax.device_put(ARRAY, NamedSharding(devices, specs))

    def local(x):
        gram, combined = both(x)
        return jax.lax.psum(gram, "data"), combined

    fn = jax.shard_map(
        local, mesh=devices, in_specs=specs, out_specs=(P(), {"x": P("data")})
    )
    assert_right(jax.jit(fn)(x))


def test_partly_manual_shard_map():
    devices = mesh(AxisType.Auto)
    fn = jax.shard_map(
        both, mesh=devices, in_specs=P(), out_specs=P(), axis_names={"data"}
    )
    assert_right(jax.jit(fn)(jnp.asarray(ARRAY)))


def test_pmap():
    gram, combined = jax.pmap(both)(jnp.stack([jnp.asarray(ARRAY)] * 4))
    assert_right((gram[3], {"x": combined["x"][3]}))


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_sharded_gradients_are_not_gathered(spec):
    sharding = NamedSharding(mesh(AxisType.Auto), spec)
    leaf = jax.ShapeDtypeStruct(ARRAY.shape, jnp.float32, sharding=sharding)
    text = jax.jit(optax_mtl.gram).lower([leaf] * 5).compile().as_text()
    assert "all-gather" not in text
    # However many leaves: one T x T sum for each axis of the mesh.
    assert text.count("all-reduce(") == len([axis for axis in spec if axis])


def test_gram_view_is_lazy_and_clear():
    def compute():
        raise AssertionError("asked for the Gram matrix")

    view = optax_mtl.GramView(2, compute)
    method = optax_mtl.linear()
    weights, _ = method.update(view, method.init(None))
    chex.assert_trees_all_equal(weights, jnp.ones(2))
    with pytest.raises(AssertionError, match="asked"):
        optax_mtl.gram(view)
    for tx in (optax.clip(1.0), optax_mtl.per_task(optax.ema(0.9), 2)):
        with pytest.raises(TypeError, match="value_and_task_grads"):
            tx.update(view, tx.init(jnp.zeros(3)))


def test_conflicts_leave_absent_tasks_out():
    vectors = np.array([[1.0, 0], [0, 0], [-1, 1], [0, 2]])
    report = optax_mtl.conflicts(jnp.asarray(vectors @ vectors.T))
    # Pairs (0, 2), (0, 3) and (2, 3) remain, with cosines -1/sqrt(2), 0, 1/sqrt(2).
    np.testing.assert_allclose(report.min_cosine, -(0.5**0.5), rtol=1e-6)
    np.testing.assert_allclose(report.conflicting, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(report.alignment, 3 / (3 + 2**0.5), rtol=1e-6)
    np.testing.assert_allclose(report.norms, [1, 0, 2**0.5, 2], rtol=1e-6)
    for gram in (jnp.zeros((3, 3)), jnp.ones((1, 1))):
        report = optax_mtl.conflicts(gram)
        assert report.min_cosine == 1
        assert report.conflicting == 0
