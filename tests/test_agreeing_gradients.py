"""gradient_agreement_filter: the fold over vectors, as the authors write it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl
from optax_mtl import weights


def fold(gradients, threshold):
    average, agreed = gradients[0], 0
    for g in gradients[1:]:
        cosine = average @ g / np.linalg.norm(average) / np.linalg.norm(g)
        if 1 - cosine <= threshold:
            average, agreed = (average + g) / 2, agreed + 1
    return average if agreed else 0 * average


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_against_vectors(double):
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(32, 6, 4)) * np.exp(rng.normal(size=(32, 6, 1)))
    none = []
    with jax.enable_x64(double):

        def update(gradients, threshold):
            method = optax_mtl.gradient_agreement_filter(threshold)
            return method.update(gradients, method.init(None))[0]

        run = jax.jit(jax.vmap(update, (0, None)))
        for threshold in (0.05, 0.7, 1.0, 1.9):
            expected = np.array([fold(g, threshold) for g in batch])
            tolerance = 1e-9 if double else 1e-5
            found = run(jnp.asarray(batch), threshold)
            np.testing.assert_allclose(found, expected, tolerance, tolerance)
            none.append((expected == 0).all(axis=1).sum())
    assert none[0] > none[1] > none[2] >= none[3] == 0


def test_at_the_threshold_rounding_errors_do_not_decide():
    """Parallel gradients at 0, orthogonal ones at 1, opposite ones at 2: in or out."""
    rng = np.random.default_rng(1)
    rotations = np.linalg.qr(rng.normal(size=(64, 3, 3)))[0]
    solve = jax.jit(jax.vmap(weights.gradient_agreement_filter, (0, None)))
    for gradients, threshold, expected in [
        ([[1, 2, 2], [3, 6, 6]], 0, [0.5, 0.5]),
        ([[1, 0, 0], [0, 3, 0]], 1, [0.5, 0.5]),
        ([[1, 0, 0], [-3, 0, 0]], 2, [0.5, 0.5]),
        ([[1, 0, 0], [-3, 0, 0]], 1.99, [0, 0]),
    ]:
        rotated = (gradients @ rotations).astype(np.float32)
        found = solve(rotated @ rotated.transpose(0, 2, 1), threshold)
        np.testing.assert_array_equal(found, np.tile(expected, (64, 1)))


def test_what_vanishes_has_a_cosine_of_zero():
    gradients = np.array([[1, 0], [-1, 0], [0, 1], [1, 1]], np.float32)
    found = weights.gradient_agreement_filter(gradients @ gradients.T, 2.0)
    np.testing.assert_allclose(found, [1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_one_that_is_alone_is_the_update():
    alone = np.diag([0, 4, 0]).astype(np.float32)
    np.testing.assert_array_equal(weights.gradient_agreement_filter(alone), [0, 1, 0])
    pair = np.array([[1, -1, 0], [-1, 4, 0], [0, 0, 0]], np.float32)
    np.testing.assert_array_equal(weights.gradient_agreement_filter(pair), [0, 0, 0])
