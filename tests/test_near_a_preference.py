"""fedmgda: against quadprog in float64, and as the two methods that it lies between."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog

from optax_mtl import weights

SIZES = (2, 5, 40)


def problem(size):
    """A Gram matrix of conflicting gradients of very different norms; a preference."""
    rng = np.random.default_rng(size)
    gradients = rng.normal(size=(size, 2 * size)) - rng.normal(size=2 * size)
    gradients *= np.exp(3 * rng.normal(size=(size, 1)))
    return gradients @ gradients.T, rng.uniform(0.5, 2, size)


def expected(gram, preference, epsilon):
    """By quadprog, of the cosines."""
    norms, size = np.sqrt(gram.diagonal()), len(gram)
    p, eye = preference / preference.sum(), np.eye(size)
    constraints = np.column_stack([np.ones(size), eye, -eye])
    lower, upper = np.maximum(p - epsilon, 0), np.minimum(p + epsilon, 1)
    limits = np.concatenate([[1.0], lower, -upper])
    cosines = gram / norms[:, None] / norms
    return quadprog.solve_qp(cosines, 0 * p, constraints, limits, 1)[0] / norms


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_against_quadprog(size, double):
    gram, preference = problem(size)
    dtype, tolerance = ("float64", 1e-9) if double else ("float32", 1e-5)
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        given = gram.astype(dtype), preference.astype(dtype)
        for epsilon in (0.02, 0.1, 0.4):
            found = np.float64(jax.jit(weights.fedmgda)(*given, epsilon))
            error = found - expected(gram, preference, epsilon)
            norm = lambda w: np.sqrt(w @ gram @ w)
            assert norm(error) < tolerance * norm(found), epsilon


@pytest.mark.parametrize("size", SIZES)
def test_between_the_average_of_the_unit_gradients_and_mgda(size):
    gram, p = problem(size)
    norms = np.sqrt(gram.diagonal())
    with jax.enable_x64(True):
        solve = jax.jit(weights.fedmgda)
        average, shortest = solve(gram, p, 0.0), solve(gram, p, 1.0)
        mgda = weights.mgda(jnp.asarray(gram), 1 / norms) / norms
    np.testing.assert_allclose(average, p / p.sum() / norms, rtol=1e-12)
    difference = np.asarray(shortest) - np.asarray(mgda)
    assert np.sqrt(difference @ gram @ difference) < 1e-9


def test_tasks_without_a_preference_are_within_epsilon_of_none():
    """And take part; those without a gradient do not."""
    gram = np.diag([1.0, 4, 0]).astype(np.float32)
    found = weights.fedmgda(gram, np.array([1, 0, 0], np.float32), 0.2)
    np.testing.assert_allclose(found, [0.8, 0.1, 0], atol=1e-6)
    nothing = weights.fedmgda(0 * gram, np.zeros(3, np.float32), 0.2)
    np.testing.assert_array_equal(nothing, 0)
