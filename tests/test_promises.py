"""Each promise of the catalog is a test, in float64 so that only methods can fail."""

import functools

import jax
import numpy as np
import pytest

import optax_mtl
from tests.common import (
    NUM_PARAMS,
    NUM_TASKS,
    compiled_fast,
    every_method,
    matrices,
    promised,
)

LOSSES = np.linspace(0.5, 2.0, NUM_TASKS)
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def aggregate(name, num_tasks):
    """The method as a compiled function of a batch of matrices and losses."""
    method = optax_mtl.get(name, num_tasks)

    def two_steps(matrix, losses):
        step = lambda state, _: method.update(matrix, state, losses=losses)[::-1]
        return jax.lax.scan(step, method.init(matrix[0]), length=2)[1]

    return compiled_fast(jax.vmap(two_steps, in_axes=(0, None)))


def call(name, batch, losses=LOSSES):
    """The first two updates, shape (8, 2, 6): without a history and with one."""
    return np.asarray(aggregate(name, len(losses))(np.asarray(batch), losses))


def size(batch):
    """The natural size of an update: the norm of the largest gradient."""
    return np.linalg.norm(batch, axis=2).max(axis=1)


def assert_same(actual, expected, batch, tolerance=TOLERANCE):
    error = np.linalg.norm(actual - expected, axis=-1)
    norm = np.linalg.norm(expected, axis=-1)
    bound = tolerance * np.maximum(norm, size(batch)[:, None])
    assert np.all(error <= bound), (error, norm)


@promised("symmetric")
def test_symmetric(name):
    batch, expected = matrices("any"), call(name, matrices("any"))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(NUM_TASKS)
        assert_same(call(name, batch[:, order], LOSSES[order]), expected, batch)


@promised("rotates")
def test_rotates(name):
    batch = matrices("any")
    rotation, _ = np.linalg.qr(
        np.random.default_rng(1).normal(size=(NUM_PARAMS, NUM_PARAMS))
    )
    assert_same(call(name, batch @ rotation), call(name, batch) @ rotation, batch)


@promised("scales")
def test_scales(name):
    batch = matrices("any")
    expected = call(name, batch)
    for factor in (1e-6, 3.7, 1e6):
        assert_same(call(name, factor * batch) / factor, expected, batch)


@promised("scale_free")
def test_scale_free(name):
    batch = matrices("regular")
    direction = lambda d: d / np.linalg.norm(d, axis=-1, keepdims=True)
    scales = np.exp(np.random.default_rng(2).normal(size=(NUM_TASKS, 1)))
    # A loss in another unit, and with it its gradient.
    actual = direction(call(name, scales * batch, scales[:, 0] * LOSSES))
    np.testing.assert_allclose(actual, direction(call(name, batch)), atol=TOLERANCE)


@promised("linear_in_scales")
def test_linear_in_scales(name):
    batch = matrices("any")
    rng = np.random.default_rng(3)
    first, second = rng.uniform(0.1, 1, (2, NUM_TASKS, 1))
    a, b = 0.3, 0.6
    # A history would depend on the scales, too.
    call_first = lambda batch: call(name, batch)[:, :1]
    expected = a * call_first(first * batch) + b * call_first(second * batch)
    assert_same(call_first((a * first + b * second) * batch), expected, batch)


@promised("never_conflicts")
@pytest.mark.parametrize("kind", ["any", "strong", "regular"])
def test_never_conflicts(name, kind):
    batch = matrices(kind)
    update = call(name, batch)
    # A stationary point leaves nothing to descend: rounding errors are no direction.
    lengths = np.linalg.norm(update, axis=-1)[..., None]
    zero = lengths <= TOLERANCE * size(batch)[:, None, None]
    norms = np.linalg.norm(batch, axis=2)[:, None] * lengths
    cosines = np.einsum("ntp,nsp->nst", batch, update) / np.where(norms > 0, norms, 1)
    assert np.all((cosines >= -TOLERANCE) | zero), cosines


@promised("stationary")
def test_stationary(name):
    batch = matrices("strong")
    assert_same(call(name, batch), np.zeros(batch[:, :1].shape), batch)


@every_method
def test_native_scale(name):
    factor = {"sum": NUM_TASKS, "mean": 1}.get(optax_mtl.METHODS[name].scale)
    if factor is None:
        return
    gradient = np.random.default_rng(5).normal(size=(8, 1, NUM_PARAMS))
    equal = np.tile(gradient, (1, NUM_TASKS, 1))
    actual = call(name, equal, np.ones(NUM_TASKS))
    assert_same(actual, factor * gradient, equal)


@promised("agrees")
def test_agrees(name):
    gradient = np.random.default_rng(4).normal(size=(8, 1, NUM_PARAMS))
    update = call(name, np.tile(gradient, (1, NUM_TASKS, 1)), np.ones(NUM_TASKS))
    cosines = np.sum(update * gradient, axis=-1) / (
        np.linalg.norm(update, axis=-1) * np.linalg.norm(gradient, axis=-1)
    )
    np.testing.assert_allclose(cosines, 1, atol=TOLERANCE)


@promised("ignores_absent")
def test_ignores_absent(name):
    batch = matrices("any")
    for absent in (0, 2):
        present = np.arange(NUM_TASKS) != absent
        expected = call(name, batch[:, present], LOSSES[present])
        losses = np.where(present, LOSSES, 0)
        actual = call(name, np.where(present[:, None], batch, 0), losses)
        assert_same(actual, expected, batch)


def test_every_promise_is_tested_and_made():
    tested = {n.removeprefix("test_") for n in globals() if n.startswith("test_")}
    made = set().union(*(row.promises for row in optax_mtl.METHODS.values()))
    assert made == tested - {"every_promise_is_tested_and_made", "native_scale"}
