"""Coordinate-wise and geometric median."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

import optax_mtl


def apply(method, updates):
    return np.asarray(jax.jit(method.update)(updates, method.init(None))[0])


def test_coordinate_median_is_that_of_numpy():
    rng = np.random.default_rng(0)
    for num_tasks in (1, 2, 5, 6):
        updates = rng.normal(size=(num_tasks, 7))
        actual = apply(optax_mtl.coordinate_median(), jnp.array(updates))
        np.testing.assert_allclose(actual, np.median(updates, axis=0), rtol=1e-6)
    updates[1] = 0  # Absent.
    actual = apply(optax_mtl.coordinate_median(), jnp.array(updates))
    expected = np.median(np.delete(updates, 1, axis=0), axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_geometric_median_minimises_the_distances():
    with jax.enable_x64(True):
        for seed in range(3):
            rng = np.random.default_rng(seed)
            updates = rng.normal(size=(5, 8)) * np.exp(rng.normal(size=(5, 1)))
            distance = lambda x, g=updates: np.linalg.norm(g - x, axis=1).sum()
            start = updates.mean(axis=0)
            expected = optimize.minimize(distance, start, options={"gtol": 1e-9}).x
            actual = apply(optax_mtl.geometric_median(), jnp.array(updates))
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_geometric_median_stays_with_the_majority():
    majority = jnp.array([[1.0, 2, 3]]) + 0.01 * jnp.eye(3)
    updates = jnp.concatenate([majority, 1e6 * jnp.array([[1.0, -1, 0], [0, 1, 1]])])
    actual = apply(optax_mtl.geometric_median(), updates)
    np.testing.assert_allclose(actual, [1, 2, 3], atol=0.05)
