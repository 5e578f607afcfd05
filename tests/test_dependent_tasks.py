"""More tasks than dimensions, stationary points, gradients that cancel.

What must hold whatever the rounding errors of the Gram matrix are: a projection onto a
cone is never longer than what is projected, a shortest convex combination never longer
than the shortest gradient, an update of CAGrad never outside of its ball. SciPy's
``nnls``, in float64 and on the gradients themselves, is the reference where it is one:
at weakly stationary points it fails, or does not end.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import optax_mtl
from optax_mtl import solvers, weights
from tests.common import (
    badly_scaled,
    normal,
    strongly_stationary,
    weakly_stationary,
)

# By how much a task may get worse, in units of its gradient and of the longest one.
TOLERANCES = {"float32": 1e-3, "float64": 1e-8}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCES))
SIZES = pytest.mark.parametrize("num_tasks", [20, 40])
NUM_PARAMS = 60
RADII = (0.4, 0.99, 1.5)


def few_dimensions(rng, num_tasks, num_params, rank):
    gradients = np.zeros((num_tasks, num_params))
    gradients[:, :rank] = rng.normal(size=(num_tasks, rank))
    return gradients


def badly_scaled_stationary(rng, num_tasks, num_params, rank):
    scales = np.exp(1.5 * rng.normal(size=(num_tasks, 1)))
    return scales * weakly_stationary(rng, num_tasks, num_params, rank)


def cancelling(rng, num_tasks, num_params, rank):
    """The sum is a small part of what it was, for some of them nothing at all."""
    gradients = few_dimensions(rng, num_tasks, num_params, rank)
    left = 10.0 ** -rng.integers(1, 8)
    return gradients - (1 - left) * gradients.mean(axis=0)


KINDS = [few_dimensions, normal, badly_scaled, cancelling]
KINDS += [strongly_stationary, weakly_stationary, badly_scaled_stationary]
SAMPLES = 3


@functools.cache
def gradients_of(num_tasks, dtype):
    """Three matrices of each kind, of any rank, rounded to the precision."""
    rng, samples = np.random.default_rng(num_tasks), []
    for kind in KINDS:
        for _ in range(SAMPLES):
            rank = rng.integers(2, num_tasks)
            samples.append(kind(rng, num_tasks, NUM_PARAMS, rank))
    gradients = np.stack(samples).astype(dtype)
    # A row of rounding errors stands for a gradient of zero.
    zero = np.abs(gradients).max(axis=2, keepdims=True) < 1e-10
    return np.where(zero, np.zeros_like(gradients), gradients)


@jax.jit
@jax.vmap
def solve(gram):
    """The projections of all gradients, and what the other solvers give."""
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    return {
        "projections": jax.vmap(solvers.dual_cone, (None, 0))(gram, identity),
        "shortest": weights.mgda(gram),
        "nonnegative": solvers.nonnegative_qp(gram, -gram.mean(axis=1)),
    }


@functools.cache
def solved(num_tasks, dtype, seed=None, factor=1.0):
    """Gradients and solutions in float64; with a seed, of the permuted tasks."""
    gradients = gradients_of(num_tasks, dtype)
    order = np.arange(num_tasks)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(num_tasks)
    gradients = gradients[:, order] * np.asarray(factor, dtype)
    x64 = dtype == "float64"
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        gram = np.einsum("nti,nsi->nts", gradients, gradients)
        found = jax.tree.map(np.float64, solve(gram))
    return np.float64(gradients), found


def norms_of(gradients):
    return np.linalg.norm(gradients, axis=-1)


@BOTH
@SIZES
def test_projections_keep_their_bounds(num_tasks, dtype):
    gradients, found = solved(num_tasks, dtype)
    tolerance, norms = TOLERANCES[dtype], norms_of(gradients)
    projections = found["projections"] @ gradients
    assert np.all(norms_of(projections) <= (1 + 1e-3 * tolerance) * norms + 1e-30)
    # In the cone: in units of the projected gradient, so of the longest, too.
    progress = projections @ gradients.transpose(0, 2, 1)
    assert np.all(progress >= -tolerance * norms[:, :, None] * norms[:, None] - 1e-30)
    # And the nearest point of it: what was added is orthogonal to it, but for what
    # rounding errors of the Gram matrix amount to in a product of so many terms.
    added = np.sum(projections * (projections - gradients), axis=2)
    terms = np.einsum("nij,nj->ni", np.abs(found["projections"]), norms)
    assert np.all(np.abs(added) <= 4 * np.finfo(dtype).eps * terms**2 + 1e-30)
    lower = np.eye(num_tasks) * (1 - np.finfo(dtype).eps)
    assert np.all(found["projections"] >= lower)


@BOTH
@SIZES
def test_projections_match_nnls(num_tasks, dtype):
    gradients, found = solved(num_tasks, dtype)
    for matrix, coefficients in list(zip(gradients, found["projections"]))[:SAMPLES]:
        longest = norms_of(matrix).max()
        for i in range(0, num_tasks, 4):
            multipliers, _ = scipy.optimize.nnls(matrix.T, -matrix[i])
            error = coefficients[i] @ matrix - (matrix[i] + multipliers @ matrix)
            assert np.linalg.norm(error) < TOLERANCES[dtype] * longest


@BOTH
@SIZES
def test_order_and_scale_do_not_change_upgrad(num_tasks, dtype):
    """But by rounding errors of the Gram matrix."""
    updates = []
    for seed, factor in ((None, 1), (1, 1), (None, 3e-9)):
        gradients, found = solved(num_tasks, dtype, seed, factor)
        updates.append((found["projections"] @ gradients).mean(axis=1) / factor)
    longest = norms_of(gradients_of(num_tasks, dtype)).max(axis=1)
    tolerance = TOLERANCES[dtype] / 10
    for update in updates[1:]:
        assert np.all(norms_of(update - updates[0]) <= tolerance * longest)


@BOTH
@SIZES
def test_shortest_combination_is_not_longer_than_the_shortest(num_tasks, dtype):
    gradients, found = solved(num_tasks, dtype)
    norms = norms_of(gradients)
    shortest = np.where(norms > 0, norms, np.inf).min(axis=1)
    update = np.einsum("nt,nti->ni", found["shortest"], gradients)
    assert np.all(norms_of(update) <= (1 + 1e-5) * shortest + 1e-30)
    np.testing.assert_allclose(found["shortest"].sum(axis=1), 1, rtol=1e-5)


@BOTH
def test_cagrad_stays_in_its_ball(dtype):
    gradients = gradients_of(20, dtype)
    average = np.full(20, 1 / 20)
    ball = jax.vmap(weights.cagrad, (None, 0, None))
    x64 = dtype == "float64"
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        gram = np.einsum("nti,nsi->nts", gradients, gradients)
        radii, shares = (np.asarray(x, dtype) for x in (RADII, average))
        solve = jax.jit(jax.vmap(lambda gram: ball(gram, radii, shares)))
        found = np.float64(solve(gram))
    gradients = np.float64(gradients)
    mean = gradients.mean(axis=1)
    update = np.einsum("nct,nti->nci", found, gradients)
    # The average of gradients that cancel is itself a rounding error.
    noise = np.finfo(dtype).eps * norms_of(gradients).max(axis=1)
    for i, c in enumerate(RADII):
        distance = norms_of(update[:, i] - mean)
        assert np.all(distance <= (1 + 1e-5) * c * norms_of(mean) + noise), c


@BOTH
def test_problems_without_a_solution_stay_finite(dtype):
    """No multipliers lead out of a stationary point; it stays with large ones."""
    for num_tasks in (20, 40):
        gradients, found = solved(num_tasks, dtype)
        # Of unit gradients the ridge, a few rounding errors, limits them.
        size = np.abs(found["nonnegative"] * norms_of(gradients)).max(axis=1)
        limit = norms_of(gradients).max(axis=1) / np.finfo(dtype).eps
        assert np.all(size <= limit)


def test_noise_larger_than_rounding_does_not_blow_up_a_projection():
    """As where a Gram matrix was summed from parts in low precision."""
    gradients = gradients_of(20, "float32")
    norms = norms_of(gradients)
    rng = np.random.default_rng(0)
    noise = 1e-4 * rng.normal(size=(len(gradients), 20, 20))
    noise = (noise + noise.transpose(0, 2, 1)) * norms[:, :, None] * norms[:, None]
    gram = np.einsum("nti,nsi->nts", gradients, gradients) + np.float32(noise)
    projections = np.float64(solve(gram)["projections"]) @ gradients
    assert np.all(norms_of(projections) <= 1.05 * norms + 1e-30)


def test_priority_cones_of_dependent_tasks():
    """No projection is longer than its gradient or against the most important one."""
    gradients = gradients_of(20, "float32")
    order = jnp.arange(20)
    cone = lambda gram: weights.priority_projection(gram, order, "cone")
    gram = np.einsum("nti,nsi->nts", gradients, gradients)
    found = np.float64(jax.jit(jax.vmap(cone))(gram))
    update = np.einsum("nt,nti->ni", found, np.float64(gradients))
    norms = norms_of(np.float64(gradients))
    assert np.all(norms_of(update) <= (1 + 1e-3) * norms.sum(axis=1))
    progress = np.einsum("ni,ni->n", update, np.float64(gradients[:, 0]))
    first = norms[:, 0]
    assert np.all(progress >= first**2 - 1e-3 * first * norms.sum(axis=1))


def test_cagrad_where_the_average_vanishes():
    method = optax_mtl.cagrad()
    for rows in ([[-0.15362895], [0.322405], [-0.16877607]], [[0.0]], [[1.0], [-1.0]]):
        gradients = jnp.array(rows)
        update, _ = method.update(gradients, method.init(gradients[0]))
        assert np.abs(update) <= 1e-7
    # Random ones whose sum vanishes but for rounding errors.
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(100, 3, 5))
    gradients = np.float32(gradients - gradients.mean(axis=1, keepdims=True))
    update = jax.jit(jax.vmap(lambda g: method.update(g, ())[0]))(gradients)
    longest = norms_of(gradients).max(axis=1)
    assert np.all(norms_of(update) <= 1e-6 * longest)


def test_cagrad_of_norms_spread_over_six_orders_of_magnitude():
    """Against float64, where such a spread is not one."""
    rng = np.random.default_rng(14)
    gradients = rng.normal(size=(48, 4, 10)) * 10.0 ** -np.array([0, 2, 4, 6])[:, None]
    # This draw was 32 % off: a sign was lost between the scales.
    gradients[0] = np.random.default_rng(14).normal(size=(4, 10))
    gradients[0] *= 10.0 ** -np.array([0, 2, 4, 6])[:, None]
    gradients = np.float32(gradients)
    find = jax.jit(jax.vmap(lambda gram: weights.cagrad(gram, 0.5, jnp.ones(4) / 4)))
    update = lambda gram: np.einsum("nt,nti->ni", np.float64(find(gram)), gradients)
    single = update(np.einsum("nti,nsi->nts", gradients, gradients))
    with jax.enable_x64(True):
        exact = np.float64(gradients)
        double = update(np.einsum("nti,nsi->nts", exact, exact))
    assert np.all(norms_of(single - double) <= 1e-4 * norms_of(double))


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_is_continuous_in_a_small_norm(mode):
    """Against NumPy's singular values of the gradients, in float64."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 50))
    directions /= norms_of(directions)[:, None]
    small = 10.0 ** -np.arange(0, 9, 0.5)
    norms = np.stack([small, np.ones_like(small), np.ones_like(small)], axis=1)
    gradients = np.float32(norms[:, :, None] * directions)
    find = lambda gram: weights.aligned_mtl(gram, jnp.ones(3), mode)
    found = jax.jit(jax.vmap(find))(np.einsum("nti,nsi->nts", gradients, gradients))
    update = np.einsum("nt,nti->ni", np.float64(found), gradients)
    eps = np.finfo(np.float32).eps
    for i, matrix in enumerate(np.float64(gradients)):
        u, values, v = np.linalg.svd(matrix, full_matrices=False)
        scales = {"min": values[-1], "median": values[1]}
        scale = scales.get(mode, np.sqrt(np.mean(values**2)))
        expected = scale * (u @ v).sum(axis=0)
        # Of a norm below a rounding error of the largest, the direction is lost.
        error = np.linalg.norm(update[i] - expected)
        assert error <= 10 * eps * scale / min(1, values[-1]) + 10 * eps, small[i]
    if mode == "min":
        assert np.all(norms_of(update) <= 2 * small + 4 * eps)


def test_aligned_mtl_counts_a_repeated_direction_once():
    """Whatever the norms of the others are: dependence is one of directions."""
    rng = np.random.default_rng(1)
    gradients = np.repeat(rng.normal(size=(3, 20)), 2, axis=0)
    gradients *= np.array([1, 2, 1e-2, 2e-2, 1e-4, 3e-4])[:, None]
    single = np.float32(gradients)
    find = jax.jit(lambda gram: weights.aligned_mtl(gram, jnp.ones(6)))
    update = np.float64(find(single @ single.T)) @ gradients
    u, values, v = np.linalg.svd(gradients, full_matrices=False)
    expected = values[2] * (u[:, :3] @ v[:3]).sum(axis=0)
    assert np.linalg.norm(update - expected) <= 1e-2 * np.linalg.norm(expected)
