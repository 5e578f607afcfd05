"""Methods under other names: what the docstrings say they are equal to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl

J3 = np.array([[1, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]], np.float32)
LOSSES = np.array([2, 0.5, 1], np.float32)


def updates(method, steps=1):
    @jax.jit
    def run(gradients, losses):
        state = method.init(jnp.zeros(4))
        for _ in range(steps):
            update, state = method.update(gradients, state, losses=losses)
        return update

    return np.asarray(run(J3, LOSSES))


def test_tilted_losses_are_a_smooth_tchebycheff_scalarization():
    """TERM: (1 / t) log mean exp(t L), by its derivative in NumPy."""
    weights = np.exp(0.7 * LOSSES) / np.exp(0.7 * LOSSES).sum()
    stch = optax_mtl.stch(3, 1 / 0.7, objective="linear", preference=[1.0, 1, 1])
    np.testing.assert_allclose(updates(stch), weights @ J3, rtol=1e-5)


def test_ntkmtl_is_a_power_of_inverse_norms():
    """(tr G / G_ii) ** p, in direction."""
    squares = (J3**2).sum(axis=1)
    for power in (0.5, 0.75):
        expected = (squares.sum() / squares) ** power @ J3
        found = updates(optax_mtl.inverse_norm(power=2 * power))
        ratio = found @ expected / np.linalg.norm(expected) ** 2
        np.testing.assert_allclose(found, ratio * expected, rtol=1e-5)


def test_harmonic_weights_sum_to_the_number_of_tasks():
    gram = jnp.asarray(J3 @ J3.T)
    for power in (0.0, 1.0, 1.5):
        weights = optax_mtl.weights.inverse_norm(gram, "harmonic", power)
        np.testing.assert_allclose(weights.sum(), 3, rtol=1e-6)


def test_bloop_without_an_average_is_a_dynamic_barrier():
    two = J3[:2]
    bloop = optax_mtl.bloop(0.3, step_size=1.0)
    barrier = optax_mtl.dynamic_barrier(beta=1 / 0.3)
    found, _ = bloop.update(two, bloop.init(jnp.zeros(4)))
    expected, _ = barrier.update(two, barrier.init(jnp.zeros(4)))
    np.testing.assert_allclose(found, 0.3 * expected, rtol=1e-5)


def test_imtl_at_equal_weights_of_losses_is_imtl_g():
    """At first, also where the sum of its weights is negative."""
    cosines = np.eye(3)
    cosines[2, :2] = cosines[:2, 2] = 0.65
    gradients = np.diag([1, 1, 0.1]) @ np.linalg.cholesky(cosines)
    gradients = jnp.asarray(gradients, jnp.float32)
    found = {}
    for strict in (False, True):
        imtl, imtl_g = (
            optax_mtl.imtl(3, strict_paper=strict),
            optax_mtl.imtl_g(strict_paper=strict),
        )
        update, _ = imtl.update(gradients, imtl.init(None), losses=jnp.ones(3))
        expected, _ = imtl_g.update(gradients, imtl_g.init(None))
        np.testing.assert_allclose(update, expected, rtol=1e-4)
        found[strict] = gradients @ update
    assert np.all(found[False] > 0) and np.all(found[True] < 0)


@pytest.mark.parametrize("k", [1, 3], ids=["CR-MOGM", "PSMGD"])
def test_smoothed_weights_now_and_then(k):
    """Of MGDA for two tasks, whose weights have a closed form, in NumPy."""
    batches = np.random.default_rng(0).normal(size=(8, 2, 4)).astype(np.float32)
    smooth = optax_mtl.smooth_weights(optax_mtl.mgda(), 2, decay=0.7)
    method = optax_mtl.update_every(smooth, k, 2)

    @jax.jit
    def run(batches):
        step = lambda state, g: method.update(g, state)[::-1]
        return jax.lax.scan(step, method.init(jnp.zeros(4)), batches)[1]

    weights = None
    for number, (g, update) in enumerate(zip(batches, np.asarray(run(batches)))):
        if number % k == 0:
            across = g[1] - g[0]
            first = np.clip(g[1] @ across / (across @ across), 0, 1)
            new = np.array([first, 1 - first])
            weights = new if weights is None else 0.7 * weights + 0.3 * new
        np.testing.assert_allclose(update, weights @ g, rtol=1e-4, atol=1e-5)
