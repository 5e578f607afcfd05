"""Linear programs on the simplex against SciPy's HiGHS in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from optax_mtl import solvers
from tests.test_solvers import precision

solve = jax.jit(jax.vmap(solvers.simplex_lp))
residual = jax.jit(jax.vmap(solvers.simplex_lp_residual))
KINDS = ["random", "integer", "parallel", "conflicting", "dependent", "duplicates"]
KINDS += ["scales 1", "scales 3"]


def make_program(rng, kind, size):
    """Objective, constraints and bounds, which some weights meet."""
    if kind == "random":
        A = rng.normal(size=(size, size))
        bounds = A @ rng.dirichlet(np.ones(size))
        relaxed = rng.exponential(size=size) * (rng.random(size) < 0.5)
        return rng.normal(size=size), A, bounds - relaxed
    if kind == "integer":  # Many constraints meet in a vertex, and many vertices tie.
        A = rng.integers(-2, 3, size=(size, size)).astype(float)
        bounds = A[:, rng.integers(size)] - rng.integers(0, 2, size=size)
        return rng.integers(-2, 3, size=size).astype(float), A, bounds
    gradients = rng.normal(size=(size, 2 * size + 3))
    if kind == "parallel":  # All cosines are 1 - 1e-4.
        gradients = 1e-2 * gradients / np.sqrt(2 * size + 3) + np.eye(2 * size + 3)[0]
    if kind == "conflicting":
        signs = rng.choice([-1, 1], size=(size, 1))
        gradients -= signs * rng.normal(size=2 * size + 3)
    if kind == "dependent":
        gradients = rng.integers(-3, 4, size=(size, 2)).astype(float)
    if kind == "duplicates":
        gradients = np.round(gradients)
        gradients[1::2] = gradients[::2][: size // 2]
    if kind.startswith("scales"):
        gradients *= np.exp(float(kind[7:]) * rng.normal(size=(size, 1)))
    gram = gradients @ gradients.T  # The shortest combination opposes no gradient.
    return gram @ rng.normal(size=size), gram, np.zeros(size)


@functools.cache
def programs(size, dtype):
    rng = np.random.default_rng(size)
    all_kinds = [make_program(rng, kind, size) for kind in KINDS for _ in range(12)]
    return [np.stack(x).astype(dtype) for x in zip(*all_kinds)]


def highs(c, A, b):
    """The best value, with the rows scaled for the absolute tolerances of HiGHS."""
    c, A, b = (np.float64(x) for x in (c, A, b))
    unit = np.abs(A).max(axis=1)
    unit[unit == 0] = 1
    tolerance = 1e-10
    found = scipy.optimize.linprog(
        -c / max(np.abs(c).max(), 1e-300),
        A_ub=-A / unit[:, None],
        b_ub=-b / unit,
        A_eq=np.ones((1, len(c))),
        b_eq=[1],
        options={
            "primal_feasibility_tolerance": tolerance,
            "dual_feasibility_tolerance": tolerance,
        },
    )
    return -found.fun * np.abs(c).max() if found.status == 0 else None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 5, 20])
def test_the_best_value_and_the_constraints(size, dtype):
    c, A, b = programs(size, dtype)
    with precision(dtype):
        w = np.asarray(solve(c, A, b))
        left = np.asarray(residual(c, A, b, w))
    assert w.dtype == dtype
    exact = {"float32": 1e-6, "float64": 1e-13}[dtype]
    w, A, b = (np.float64(x) for x in (w, A, b))
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=exact)
    assert (w >= 0).all()
    solved = 0
    for i, (objective, matrix, bounds, weights) in enumerate(zip(c, A, b, w)):
        value = highs(objective, matrix, bounds)
        if value is None:  # Rounded to float32, a vertex is all that there was.
            continue
        solved += 1
        terms = np.abs(matrix) @ weights + np.abs(bounds)
        assert (matrix @ weights - bounds >= -exact * terms).all(), KINDS[i // 12]
        error = abs(np.float64(objective) @ weights - value) / np.abs(objective).max()
        # Of HiGHS's own tolerance in float64.
        assert error < {"float32": 1e-5, "float64": 1e-9}[dtype], KINDS[i // 12]
        # Its multipliers come from products, which keep half of the digits; those
        # between very different scales none in float32.
        if dtype == "float64" or KINDS[i // 12] != "scales 3":
            assert left[i] < np.finfo(dtype).eps ** 0.5, KINDS[i // 12]
    assert solved > 0.95 * len(c)


def test_the_residual_sees_other_weights():
    c, A, b = programs(5, "float32")
    w = np.array(solve(c, A, b))
    other = np.roll(w, 1, axis=1)
    found = np.asarray(residual(c, A, b, other))
    worse = np.abs(np.einsum("ni,ni->n", c, w - other)) > 1e-2 * np.abs(c).max(axis=1)
    assert worse.sum() > 50 and (found[worse] > 1e-3).all()


def test_only_weights_of_the_mask():
    c, A, b = programs(5, "float64")
    keep = np.array([True, False, True, True, False])
    masked = jax.jit(jax.vmap(solvers.simplex_lp, (0, 0, 0, None)))
    with precision("float64"):
        w = np.asarray(masked(c, A, b, keep))
        few = solve(c[:, keep], np.ascontiguousarray(A[:, :, keep]), b)
        left = jax.jit(jax.vmap(solvers.simplex_lp_residual, (0, 0, 0, 0, None)))
        others = np.asarray(left(c, A, b, w, keep))
    assert (w[:, ~keep] == 0).all()
    np.testing.assert_allclose(w[:, keep], few, atol=1e-12)
    feasible = np.asarray(
        [highs(*p) is not None for p in zip(c[:, keep], A[:, :, keep], b)]
    )
    assert feasible.sum() > 20 and (others[feasible] < 1e-9).all()


def test_without_a_solution_constraints_are_violated_least():
    rng = np.random.default_rng(0)
    A, c = rng.normal(size=(20, 6, 4)), rng.normal(size=(20, 4))
    A /= np.abs(A).max(axis=2, keepdims=True)
    b = np.ones((20, 6))  # More than any entry.
    with precision("float64"):
        w = np.asarray(solve(c, A, b))
    for matrix, weights in zip(A, w):
        # Minimise z: A w + z >= 1, on the simplex.
        least = scipy.optimize.linprog(
            [0, 0, 0, 0, 1],
            A_ub=-np.column_stack([matrix, np.ones(6)]),
            b_ub=-np.ones(6),
            A_eq=[[1, 1, 1, 1, 0]],
            b_eq=[1],
        ).x[-1]
        # Rows are measured by powers of two near their largest entries.
        assert np.max(1 - matrix @ weights) < 4 * least
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert np.isfinite(w).all()


def test_scales_do_not_matter_and_nan_stays():
    c, A, b = programs(5, "float32")
    w = np.asarray(solve(c, A, b))
    units = np.float32(2.0) ** np.array([40, -40, 3, 0, -60])
    found = solve(np.float32(2**-50) * c, A * units[:, None], b * units)
    # Of several that are optimal it may be another.
    gain = np.einsum("ni,ni->n", c, found - w) / np.abs(c).max(axis=1)
    assert np.abs(gain).max() < 1e-5
    terms = np.einsum("nkt,nt->nk", np.abs(A), found) + np.abs(b)
    assert (np.einsum("nkt,nt->nk", A, found) - b >= -1e-6 * terms).all()
    A = A.copy()
    A[:, 0, 0] = np.nan
    assert np.isnan(solve(c, A, b)).all()


def test_one_weight_and_no_constraints():
    assert solvers.simplex_lp(jnp.ones(1), jnp.ones((1, 1)), -jnp.ones(1)) == 1
    w = solvers.simplex_lp(jnp.array([1.0, 3, 2]), jnp.zeros((3, 3)), jnp.zeros(3))
    np.testing.assert_array_equal(w, [0, 1, 0])
