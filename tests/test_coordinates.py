"""Sums and order along the task axis, and the random signs of GradDrop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl
from optax_mtl import coordinates

LIMIT = coordinates._MAX_SLICES
ELEMENTWISE = ["graddrop", "energy_gate", "sam_gs", "adatask", "excess_mtl"]


@pytest.mark.parametrize("num_tasks", range(1, LIMIT + 1))
def test_the_network_sorts(num_tasks):
    # A network that sorts all zeros and ones sorts anything (Knuth, 5.3.4).
    if num_tasks <= 12:
        bits = np.arange(2**num_tasks) >> np.arange(num_tasks)[:, None] & 1
    else:
        rng = np.random.default_rng(0)
        bits = rng.random((num_tasks, 4096)) < rng.random(4096)
    entries = list(bits)
    for i, j in coordinates._comparisons(num_tasks):
        low = np.minimum(entries[i], entries[j])
        entries[i], entries[j] = low, np.maximum(entries[i], entries[j])
    np.testing.assert_array_equal(entries, np.sort(bits, axis=0))


@pytest.mark.parametrize("num_tasks", [1, 4, LIMIT, LIMIT + 1])
def test_order_is_that_of_numpy(num_tasks):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, size=(num_tasks, 50)).astype(np.float32)  # With ties.
    x[0, :3] = np.nan, np.inf, -np.inf
    exists = rng.random(num_tasks) < 0.8
    exists[0] = True
    each = jax.vmap(coordinates.combine_in_order, (0, None, None))
    found = np.asarray(jax.jit(each)(np.eye(num_tasks), x, exists))
    count = exists.sum()
    np.testing.assert_array_equal(found[:count, 3:], np.sort(x[exists], axis=0)[:, 3:])
    assert not np.isfinite(found[:, :3]).any()
    assert np.all(found[count:, 3:] == np.finfo(np.float32).max)


def test_coordinate_median_is_that_of_numpy_for_any_number_of_tasks():
    for num_tasks in (4, 9, LIMIT, LIMIT + 1):
        x = np.random.default_rng(0).normal(size=(num_tasks, 40)).astype(np.float32)
        x[num_tasks // 2, 0] = np.nan
        method = optax_mtl.coordinate_median()
        found = jax.jit(method.update)(x, method.init(x[0]))[0]
        np.testing.assert_allclose(found, np.median(x, axis=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("devices", [1, 8])
def test_reduce_is_that_of_numpy(monkeypatch, devices):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    counts = (1, 2, 7, LIMIT, LIMIT + 1, 3 * LIMIT + 1)
    draw = np.random.default_rng(0).normal
    xs = [draw(size=(count, 5)).astype(np.float32) for count in counts]
    scale = lambda w, x: w * x

    @jax.jit
    def reduce(xs):
        weights = [jnp.arange(1.0, len(x) + 1) for x in xs]
        return [
            (
                coordinates.reduce(jnp.add, coordinates.each(scale, w, x)),
                coordinates.reduce(jnp.maximum, coordinates.each(scale, w, x)),
            )
            for w, x in zip(weights, xs)
        ]

    for x, (total, largest) in zip(xs, reduce(xs)):
        scaled = np.arange(1.0, len(x) + 1)[:, None] * x
        np.testing.assert_allclose(total, scaled.sum(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(largest, scaled.max(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["graddrop", "energy_gate", "sam_gs", "adatask", "excess_mtl"]
)
def test_one_device_and_many_agree(monkeypatch, name):
    rng = np.random.default_rng(0)
    updates = {"a": rng.normal(size=(3, 4, 5)), "b": rng.normal(size=(3, 6))}
    updates = jax.tree.map(np.float32, updates)
    method = optax_mtl.get(name, 3)
    found = []
    for devices in (8, 1):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        state = method.init(jax.tree.map(lambda x: x[0], updates))
        found.append(jax.jit(lambda *args: method.update(*args))(updates, state))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *found)


def test_sums_and_marks_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    for shape in [(3,), (3, 7), (3, 4, 5)]:
        x = rng.normal(size=shape).astype(np.float32)
        x[1] = 0
        total, some = jax.jit(coordinates.sum_and_any)(x, x != 0)
        np.testing.assert_allclose(total, x.reshape(3, -1).sum(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(some, [True, False, True])


def test_signs_are_random():
    # Entries of 1, and -1 or -1/3: the sign is positive in 1/2 and 3/4 of the places.
    size, steps = 2**16, 4
    even = np.arange(size).reshape(256, 256) % 2 == 0
    other = np.where(even, -1, -1 / 3)
    updates = {name: np.float32([np.ones_like(other), other]) for name in ("a", "b")}
    method = optax_mtl.graddrop(key=3)

    def step(state, _):
        update, state = method.update(updates, state)
        return state, update

    run = jax.jit(lambda state: jax.lax.scan(step, state, length=steps)[1])
    out = run(method.init(None))
    signs = np.stack([np.asarray(out["a"]) > 0, np.asarray(out["b"]) > 0])
    within = 5 / np.sqrt(steps * size)  # Five standard deviations are less.
    assert abs(signs[..., even].mean() - 1 / 2) < within
    assert abs(signs[..., ~even].mean() - 3 / 4) < within
    # Places, leaves and steps know nothing of each other.
    noise = (signs - np.where(even, 1 / 2, 3 / 4)).reshape(2, steps, size)
    pairs = [(noise[0], noise[1]), (noise[:, 1:], noise[:, :-1])]
    for shift in (1, 2, 3, 16, 255, 256, 257, 4096):
        pairs.append((noise[..., shift:], noise[..., :-shift]))
    for one, other in pairs:
        assert abs((one * other).mean()) < 5 * 0.25 / np.sqrt(one.size)
