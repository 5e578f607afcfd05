"""Solvers against quadprog and SciPy in float64, and on degenerate problems.

Errors are relative: of a direction in the norm of the Gram matrix, which is the norm
of the combined gradients. References solve the same matrix, rounded to the precision
under test.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog
import scipy.optimize

from optax_mtl import solvers

SIZES = [("float32", size) for size in (2, 3, 5, 10, 16, 32, 64)]
SIZES += [("float64", size) for size in (5, 16, 64)]
FEW_SIZES = [("float32", size) for size in (2, 5, 16, 32)]
FEW_SIZES += [("float64", size) for size in (5, 16)]
KINDS = ["random", "conflicting", "barely independent", "nearly dependent"]
KINDS += ["nearly opposite", "scales 1.5", "scales 3"]
TOLERANCES = {"float32": 1e-5, "float64": 1e-9}

dual_cone = solvers.dual_cone
nonnegative_qp = solvers.nonnegative_qp
simplex_qp = solvers.simplex_qp
simplex_cone_program = solvers.simplex_cone_program
dual_cone_residual = jax.jit(solvers.dual_cone_residual)
nonnegative_qp_residual = jax.jit(solvers.nonnegative_qp_residual)
simplex_qp_residual = jax.jit(solvers.simplex_qp_residual)
simplex_cone_program_residual = jax.jit(solvers.simplex_cone_program_residual)
fairness_residual = jax.jit(solvers.fairness_residual)
pinv, pinv_solve = jax.jit(solvers.pinv), jax.jit(solvers.pinv_solve)
pinv_residual = jax.jit(solvers.pinv_residual)
pinv_solve_residual = jax.jit(solvers.pinv_solve_residual)


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def make_gram(rng, kind, size, dtype):
    parameters = size + 1 if kind == "barely independent" else 2 * size + 3
    gradients = rng.normal(size=(size, parameters))
    signs = rng.choice([-1, 1], size=(size, 1))
    if kind == "conflicting":
        gradients -= signs * rng.normal(size=parameters)
    if kind.startswith("nearly"):  # All cosines are 1 - 1e-4.
        basis = np.linalg.qr(rng.normal(size=(parameters, size + 1)))[0].T
        gradients = basis[0] + 1e-2 * basis[1:]
    if kind == "nearly opposite":
        gradients *= signs
    if kind.startswith("scales"):
        sigma = float(kind.split()[1])
        gradients *= np.exp(sigma * rng.normal(size=(size, 1)))
    return (gradients @ gradients.T).astype(dtype)


def norm(gram, w):
    return np.sqrt(max(w @ gram @ w, 0))


def close(gram, x, expected, tolerance):
    """Whether x and expected combine gradients to the same vector."""
    x, gram = np.asarray(x, np.float64), np.asarray(gram, np.float64)
    error = norm(gram, x - expected)
    # An expected value of zero means: zero but for rounding errors.
    return error <= tolerance * norm(gram, expected) + 1e-30


def quadratic_program(Q, q, constraints, bounds, equalities=0):
    """min x'Qx/2 - q'x with constraints' x >= bounds, by quadprog.

    quadprog finds the active constraints of the problem with a unit diagonal; its
    solution is then refined in extended precision.
    """
    size = len(q)
    scale = 1 / np.sqrt(Q.diagonal())
    Q, q, C = scale[:, None] * Q * scale, q * scale, constraints * scale[:, None]
    active = quadprog.solve_qp(Q, q, C, bounds, equalities)[5]
    active = np.union1d(np.arange(equalities), active[active > 0] - 1).astype(int)
    A, zero = C[:, active], np.zeros((len(active),) * 2)
    system = np.block([[Q, A], [A.T, zero]]).astype(np.longdouble)
    right = np.concatenate([q, bounds[active]]).astype(np.longdouble)
    solution = np.zeros_like(right)
    for _ in range(4):
        residual = (right - system @ solution).astype(np.float64)
        solution += np.linalg.solve(system.astype(np.float64), residual)
    return scale * solution[:size].astype(np.float64)


def expected_bounded(Q, q, lower):
    return quadratic_program(np.float64(Q), np.float64(q), np.eye(len(q)), lower)


def expected_simplex(Q, q):
    size = len(q)
    constraints = np.column_stack([np.ones(size), np.eye(size)])
    bounds = np.append(1.0, np.zeros(size))
    return quadratic_program(np.float64(Q), -np.float64(q), constraints, bounds, 1)


@pytest.mark.parametrize("dtype, size", SIZES)
def test_quadratic_programs_match_quadprog(dtype, size):
    rng, tolerance = np.random.default_rng(size), TOLERANCES[dtype]
    with precision(dtype):
        for kind in KINDS:
            gram = make_gram(rng, kind, size, dtype)
            norms = np.sqrt(gram.diagonal())
            for lower in (np.eye(size)[0], rng.random(size), rng.random(size) / norms):
                lower = lower.astype(dtype)
                v = dual_cone(gram, lower)
                expected = expected_bounded(gram, np.zeros(size), np.float64(lower))
                assert close(gram, v, expected, tolerance), (kind, lower)
                assert dual_cone_residual(gram, lower, v) < tolerance
            for q in (np.zeros(size, dtype), gram.mean(1)):
                w = simplex_qp(gram, q)
                assert close(gram, w, expected_simplex(gram, q), tolerance), kind
                assert simplex_qp_residual(gram, w, q) < tolerance
            q = (norms * (1 + rng.normal(size=size))).astype(dtype)
            x = nonnegative_qp(gram, q)
            expected = expected_bounded(gram, q, np.zeros(size))
            assert close(gram, x, expected, tolerance), kind
            assert nonnegative_qp_residual(gram, q, x) < tolerance


def expected_cone_program(gram, b, c):
    """The quadratic program w'Mw / 2 + (s / c) b'w whose solution has norm s."""
    gram, b, c = np.float64(gram), np.float64(b), float(c)
    excess = lambda k: norm(gram, expected_simplex(gram, k * b)) / c - k
    low = 0.9 * norm(gram, expected_simplex(gram, 0 * b)) / c
    high = 1.1 * np.sqrt(gram.diagonal().max()) / c
    root = scipy.optimize.brentq(excess, low, high, xtol=1e-300, rtol=1e-14)
    return expected_simplex(gram, root * b)


@pytest.mark.parametrize("dtype, size", FEW_SIZES)
def test_simplex_cone_program_matches_quadprog(dtype, size):
    rng, tolerance = np.random.default_rng(size), TOLERANCES[dtype]
    with precision(dtype):
        for kind in KINDS:
            gram = make_gram(rng, kind, size, dtype)
            b = gram.mean(1)
            exact = np.float64(gram)
            for ratio in (0.1, 0.4, 1.0, 5.0):
                c = (ratio * np.sqrt(gram.mean())).astype(dtype)
                w = simplex_cone_program(gram, b, c)
                assert simplex_cone_program_residual(gram, b, c, w) < tolerance
                w = np.float64(w)
                expected = expected_cone_program(gram, b, c)
                length, expected_length = norm(exact, w), norm(exact, expected)
                value = b @ w + c * length
                excess = value - (b @ expected + c * expected_length)
                assert excess < tolerance * c * length, (kind, ratio)
                # CAGrad uses the direction, which is not unique in general for c = 1.
                if ratio != 1:
                    w, expected = w / length, expected / expected_length
                    assert close(gram, w, expected, tolerance), (kind, ratio)


def test_simplex_cone_program_without_norm_takes_the_smallest_entry():
    gram, b = np.diag([1.0, 2.0, 3.0]), np.array([0.3, 0.1, 0.2])
    w = simplex_cone_program(gram, b, 0.0)
    np.testing.assert_allclose(w, [0, 1, 0], atol=1e-6)


def expected_fairness(gram, alpha, p, start):
    """Newton's method in extended precision; the solution is unique."""
    gram, a, p = (np.asarray(x, np.longdouble) for x in (gram, start, p))
    a = np.maximum(a, 1e-60)  # float32 cannot hold the smallest of alpha = 10.
    for _ in range(50):
        target = p * a ** (-1 / np.longdouble(alpha))
        residual = target - gram @ a
        hessian = gram + np.diag(target / a / alpha)
        scale = 1 / np.sqrt(hessian.diagonal())
        hessian = scale[:, None] * hessian * scale
        move = 0 * a
        for _ in range(4):
            error = (scale * residual - hessian @ move).astype(np.float64)
            move += np.linalg.solve(hessian.astype(np.float64), error)
        move *= scale
        a = a + move * min(1, 0.9 / max(1e-9, np.max(-move / a)))
    assert np.max(np.abs(gram @ a / target - 1)) < 1e-8
    return a.astype(np.float64)


@pytest.mark.parametrize("dtype, size", FEW_SIZES)
def test_fairness_solves_its_equations(dtype, size):
    rng, tolerance = np.random.default_rng(size), TOLERANCES[dtype]
    with precision(dtype):
        for kind in KINDS:
            gram = make_gram(rng, kind, size, dtype)
            p = rng.uniform(0.5, 2, size).astype(dtype)
            for alpha in (0.5, 1.0, 2.0, 5.0, 10.0):
                a = solvers.fairness(gram, alpha, p)
                expected = expected_fairness(gram, alpha, p, a)
                assert close(gram, a, expected, tolerance), (kind, alpha)
                assert fairness_residual(gram, alpha, a, p) < tolerance


@pytest.mark.parametrize("dtype, size", FEW_SIZES)
def test_pseudo_inverse(dtype, size):
    rng, tolerance = np.random.default_rng(size), TOLERANCES[dtype]
    with precision(dtype):
        eps = np.finfo(dtype).eps
        for kind in ("random", "conflicting", "barely independent", "scales 1.5"):
            gram = make_gram(rng, kind, size, dtype)
            exact = np.linalg.pinv(np.float64(gram), size * eps, hermitian=True)
            inverse = pinv(gram)
            condition = np.linalg.cond(gram)
            error = np.abs(inverse - exact).max() / np.abs(exact).max()
            assert error < size * eps * condition
            assert pinv_residual(gram, inverse) < size * eps * condition
            if condition < 0.1 / (size * eps):  # Far from what counts as singular.
                b = np.sqrt(gram.diagonal())
                x = pinv_solve(gram, b)
                assert close(gram, x, exact @ np.float64(b), tolerance), kind
                assert pinv_solve_residual(gram, b, x) < tolerance


def test_pseudo_inverse_of_singular_matrices():
    gradients = np.array([[1, 2, 3], [2, 4, 6], [0, 1, 1], [1, 1, 2]], np.float32)
    gram, b = gradients @ gradients.T, np.array([1, 2, 3, 4], np.float32)
    exact = np.linalg.pinv(np.float64(gram), hermitian=True)
    np.testing.assert_allclose(pinv(gram), exact, atol=2e-6)
    np.testing.assert_allclose(pinv_solve(gram, b), exact @ b, atol=2e-6)
    assert not np.any(pinv(0 * gram))
    assert not np.any(pinv_solve(0 * gram, b))


def test_golden_values():
    """Of TorchJD's test matrix, and of SciPy's solutions for three tasks."""
    gram = np.array([[18, -22], [-22, 38]], np.float32)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6)
    close(simplex_qp(gram), [0.6, 0.4])
    close(dual_cone(gram, np.array([0.5, 0], np.float32)), [0.5, 11 / 38])
    close(solvers.fairness(gram, 1.0), [0.59146104, 0.40707143])
    gram = np.array([[11, -5, 2.5], [-5, 6, -1], [2.5, -1, 6.25]], np.float32)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)
    close(simplex_qp(gram), [0.316619, 0.514327, 0.169054])
    close(solvers.fairness(gram, 1.0), [0.431395, 0.669775, 0.368637])
    close(solvers.fairness(gram, 5.0), [0.285360, 0.462941, 0.184318])
    close(nonnegative_qp(gram, gram @ np.ones(3, np.float32)), [1, 1, 1])


def test_projection_on_the_simplex():
    v = np.array([0.3, 2.0, 1.9, 1e6 - 1e6], np.float32)
    w = solvers.project_simplex(v)
    np.testing.assert_allclose(w, [0, 0.55, 0.45, 0], atol=1e-6)
    assert solvers.project_simplex_residual(v, w) < 1e-6
    assert solvers.project_simplex_residual(v, np.full(4, 0.25, np.float32)) > 0.1
    mask = np.array([True, False, True, True])
    w = solvers.project_simplex(v, mask)
    np.testing.assert_allclose(w, [0, 0, 1, 0], atol=1e-6)
    w = solvers.project_simplex(np.array([1e8, 1e8, -3], np.float32))
    np.testing.assert_allclose(w, [0.5, 0.5, 0])


@pytest.mark.parametrize("size, rank", [(5, 1), (5, 2), (16, 5), (32, 9)])
def test_dependent_gradients(size, rank):
    """Duplicates and more tasks than parameters, of integers: no rounding errors."""
    rng = np.random.default_rng(size)
    gradients = rng.integers(-4, 5, size=(size, rank)).astype(np.float32)
    gradients[:, 0] = np.abs(gradients[:, 0]) + 1  # The origin is not in the hull.
    gradients[1] = gradients[0]
    gram = gradients @ gradients.T
    J = np.float64(gradients).T

    # The point of least norm in the hull, by non-negative least squares.
    right = np.append(np.zeros(rank), 1)
    w, _ = scipy.optimize.nnls(np.vstack([J, np.ones(size)]), right)
    w /= w.sum()
    direction = J @ np.float64(simplex_qp(gram))
    np.testing.assert_allclose(direction, J @ w, atol=1e-5 * np.linalg.norm(J @ w))

    lower = rng.uniform(-1, 1, size).astype(np.float32)
    multipliers, _ = scipy.optimize.nnls(J, -J @ lower)
    v = dual_cone(gram, lower)
    scale = np.linalg.norm(J @ lower)
    expected = J @ (lower + multipliers)
    np.testing.assert_allclose(J @ np.float64(v), expected, atol=1e-5 * scale)
    assert np.all(v >= lower)
    assert np.max(np.abs(v)) < 100

    a = solvers.fairness(gram, 1.0)
    assert fairness_residual(gram, 1.0, a) < 1e-6
    radius = np.sqrt(gram.mean())
    w = simplex_cone_program(gram, gram.mean(1), radius)
    residual = simplex_cone_program_residual(gram, gram.mean(1), radius, w)
    assert residual < 1e-5


def test_pareto_stationary_gradients():
    """A convex combination vanishes: zero directions, and finite weights."""
    gradients = np.array([[2, 1], [-4, -2], [1, -3], [-1, 3], [1, 1]], np.float32)
    gram, ones = gradients @ gradients.T, np.ones(5, np.float32)
    length = np.sqrt(gram.diagonal()).sum()
    cone_program = simplex_cone_program(gram, gram.mean(1), 10.0)
    solutions = [simplex_qp(gram), dual_cone(gram, ones), cone_program]
    for w in solutions + [solvers.fairness(gram, a) for a in (0.5, 1.0, 5.0)]:
        assert np.all(np.isfinite(w))
        relative = np.linalg.norm(w @ gradients) / (np.abs(w).sum() * length)
        assert relative < 1e-4
    assert np.all(np.isfinite(nonnegative_qp(gram, ones)))


def test_scale_of_the_gradients_does_not_matter():
    rng = np.random.default_rng(0)
    gram = make_gram(rng, "conflicting", 5, np.float32)
    lower = rng.random(5).astype(np.float32)
    for scale in np.float32([1e-24, 1e-12, 1e12, 1e24]):
        scaled, root = gram * scale, np.sqrt(scale)
        same = lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-6, atol=1e-6)
        same(simplex_qp(scaled), simplex_qp(gram))
        same(dual_cone(scaled, lower), dual_cone(gram, lower))
        same(nonnegative_qp(scaled, lower * scale), nonnegative_qp(gram, lower))
        for alpha in (0.5, 1.0, 4.0):
            power = np.float64(scale) ** (alpha / (1 + alpha))
            a = np.float64(solvers.fairness(scaled, alpha)) * power
            np.testing.assert_allclose(a, solvers.fairness(gram, alpha), rtol=1e-5)
        w = simplex_cone_program(scaled, scaled.mean(1), 2 * root)
        same(w, simplex_cone_program(gram, gram.mean(1), 2.0))
        normalized, trace = solvers.normalize_gram(scaled)
        same(normalized, solvers.normalize_gram(gram)[0])
        np.testing.assert_allclose(trace, np.trace(scaled), rtol=1e-6)


def test_absent_tasks():
    """Zero rows change nothing for the others."""
    gram = make_gram(np.random.default_rng(0), "conflicting", 5, np.float32)
    present = np.arange(16) % 3 == 1
    padded = np.zeros((16, 16), np.float32)
    padded[np.ix_(present, present)] = gram

    def same(x, y):
        np.testing.assert_allclose(x[present], y, rtol=1e-5, atol=1e-6)
        assert not np.any(x[~present])

    ones = present.astype(np.float32)
    same(simplex_qp(padded, None, present), simplex_qp(gram))
    same(dual_cone(padded, ones), dual_cone(gram, ones[present]))
    same(nonnegative_qp(padded, ones), nonnegative_qp(gram, ones[present]))
    same(solvers.fairness(padded, 2.0), solvers.fairness(gram, 2.0))
    w = simplex_cone_program(padded, padded.mean(1), 1.0, present)
    same(w, simplex_cone_program(gram, padded.mean(1)[present], 1.0))
    a = solvers.fairness(padded + np.eye(16, dtype=np.float32), 1.0, mask=present)
    same(a, solvers.fairness(gram + np.eye(5, dtype=np.float32), 1.0))


def test_no_gradients():
    nothing, ones = np.zeros((5, 5), np.float32), np.ones(5, np.float32)
    assert not np.any(solvers.normalize_gram(nothing)[0])
    assert not np.any(solvers.fairness(nothing, 1.0))
    assert not np.any(nonnegative_qp(nothing, ones))
    np.testing.assert_array_equal(dual_cone(nothing, ones), ones)
    np.testing.assert_allclose(simplex_qp(nothing).sum(), 1)
    w = simplex_cone_program(nothing, ones, 1.0)
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-6)


def test_one_task():
    gram, one = np.array([[4]], np.float32), np.ones(1, np.float32)
    assert simplex_qp(gram) == 1
    assert dual_cone(gram, one) == 1
    assert nonnegative_qp(gram, one) == 0.25
    assert simplex_cone_program(gram, one, 0.5) == 1
    np.testing.assert_allclose(solvers.fairness(gram, 1.0), [0.5], rtol=1e-6)
    np.testing.assert_allclose(solvers.fairness(gram, 2.0), [4 ** (-2 / 3)], rtol=1e-6)
    assert pinv(gram) == 0.25


@pytest.mark.parametrize("size", [5, 16])
def test_nan_in_gives_nan_out(size):
    gram = np.eye(size, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = np.nan
    ones = np.ones(size, np.float32)
    for solution in (
        simplex_qp(gram),
        dual_cone(gram, ones),
        nonnegative_qp(gram, ones),
        solvers.fairness(gram, 1.0),
        simplex_cone_program(gram, ones, 1.0),
        pinv_solve(gram, ones),
        dual_cone(np.eye(size, dtype=np.float32), ones * np.nan),
        nonnegative_qp(np.eye(size, dtype=np.float32), ones * np.nan),
        simplex_qp(np.eye(size, dtype=np.float32), ones * np.nan),
    ):
        assert np.all(np.isnan(solution))


def test_128_tasks():
    """The trace does not grow with the number of tasks."""
    gram = make_gram(np.random.default_rng(0), "conflicting", 128, np.float32)
    lower = jnp.eye(128)[:3]
    project = jax.jit(jax.vmap(solvers.dual_cone, (None, 0)))
    for i, v in enumerate(project(gram, lower)):
        assert dual_cone_residual(gram, lower[i], v) < 1e-6
    # In 32 dimensions they cancel; in 64 they hardly do, which is the hardest.
    for rank in (32, 64):
        J = np.random.default_rng(0).normal(size=(128, rank)).astype(np.float32)
        v = project(J @ J.T, lower)
        for i in range(3):
            # 32 rounding errors: what such a Gram matrix determines.
            assert dual_cone_residual(J @ J.T, lower[i], v[i]) < 4e-6
        # Zero but for the root of a rounding error: zero is a convex combination.
        lengths = np.linalg.norm(v @ J, axis=1)
        assert np.all(lengths < 1e-3 * np.linalg.norm(J[:3], axis=1))
    w = simplex_qp(gram)
    assert simplex_qp_residual(gram, w) < 1e-6
    assert fairness_residual(gram, 1.0, solvers.fairness(gram, 1.0)) < 1e-6

    def length(function, size):
        return len(str(jax.make_jaxpr(function)(jnp.eye(size))).splitlines())

    for function in (
        lambda gram: solvers.dual_cone(gram, gram[0]),
        solvers.simplex_qp,
        lambda gram: simplex_cone_program(gram, gram[0], 1.0),
        lambda gram: solvers.fairness(gram, 1.0),
        solvers.pinv,
    ):
        assert length(function, 128) <= 1.1 * length(function, 16)


def loops(jaxpr):
    """The equations of all while loops, nested ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from loops(value.jaxpr)


@pytest.mark.parametrize("name", ["fairness", "simplex_cone_program", "dual_cone"])
def test_loops_end_under_vmap(name):
    """vmap computes a condition twice: with arithmetic in it, rounding may differ."""
    solver, gram = getattr(solvers, name), jnp.eye(10)
    arguments = {"fairness": (1.0,), "simplex_cone_program": (gram[0], 1.0)}
    jaxpr = jax.make_jaxpr(solver)(gram, *arguments.get(name, (gram[0],)))
    found = list(loops(jaxpr.jaxpr))
    assert found
    for loop in found:
        condition = loop.params["cond_jaxpr"].jaxpr
        used = {equation.primitive.name for equation in condition.eqns}
        assert used <= {"lt", "gt", "and", "convert_element_type"}


def test_solvers_inside_shard_map():
    """On gradients that differ from device to device."""
    gram = make_gram(np.random.default_rng(0), "conflicting", 10, np.float32)

    def solve(gram):
        b = gram.mean(1)
        w = [simplex_qp(gram), dual_cone(gram, b), solvers.fairness(gram, 1.0)]
        return jnp.stack([*w, simplex_cone_program(gram, b, 1.0)])

    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    grams = np.concatenate([gram, np.eye(10, dtype=np.float32)])
    sharded = jax.shard_map(solve, mesh=mesh, in_specs=spec, out_specs=spec)
    solutions = jax.jit(sharded)(grams)
    expected = jnp.concatenate([solve(grams[:10]), solve(grams[10:])])
    np.testing.assert_allclose(solutions, expected, rtol=1e-5, atol=1e-6)


def test_residuals_see_wrong_solutions():
    gram = make_gram(np.random.default_rng(0), "conflicting", 5, np.float32)
    ones = np.ones(5, np.float32)
    wrong = np.array([0.6, 0.1, 0.1, 0.1, 0.1], np.float32)
    assert simplex_qp_residual(gram, wrong) > 1e-2
    assert simplex_qp_residual(gram, 2 * simplex_qp(gram)) > 0.5
    assert simplex_cone_program_residual(gram, ones, 1.0, wrong) > 1e-2
    assert nonnegative_qp_residual(gram, ones, wrong) > 1e-2
    assert dual_cone_residual(gram, ones, ones - wrong) > 1e-2
    assert fairness_residual(gram, 1.0, wrong) > 1e-2
    assert pinv_residual(gram, 1.1 * pinv(gram)) > 1e-2
    assert pinv_solve_residual(gram, ones, wrong) > 1e-3


@pytest.mark.parametrize(
    "dtype, size", [("float32", 3), ("float32", 40), ("float64", 40)]
)
def test_simplex_with_bounds_matches_quadprog(dtype, size):
    rng, tolerance = np.random.default_rng(size), TOLERANCES[dtype]
    constraints = np.column_stack([np.ones(size), np.eye(size), -np.eye(size)])
    with precision(dtype):
        for kind in [*KINDS, *["scales 3"] * 5]:
            gram = make_gram(rng, kind, size, dtype)
            middle = rng.dirichlet(np.ones(size))
            # The narrow ones force large gradients upon the solution.
            for width in (0.2 / size, 0.5 / size, 2 / size, 0.3):
                lower = np.maximum(middle - width, 0).astype(dtype)
                upper = np.minimum(middle + width, 1).astype(dtype)
                q = gram.mean(1) if width == 0.3 else np.zeros(size, dtype)
                w = simplex_qp(gram, q, bounds=(lower, upper))
                limits = np.concatenate([[1.0], lower, -upper])
                exact, linear = np.float64(gram), -np.float64(q)
                expected = quadratic_program(exact, linear, constraints, limits, 1)
                assert close(gram, w, expected, tolerance), (kind, width)
                residual = simplex_qp_residual(gram, w, q, None, (lower, upper))
                assert residual < tolerance, (kind, width)


def test_simplex_with_bounds_where_all_weights_are_at_one():
    """Corners of the box, also those with as many weights at each bound, and ties."""
    eye = np.eye(4, dtype=np.float32)
    gram = np.outer([3, 2, 1, 1], [3, 2, 1, 1]).astype(np.float32)
    narrow = np.full(4, 0.15, np.float32), np.full(4, 0.35, np.float32)
    one = np.zeros(4, np.float32), eye[2]
    point = np.full(4, 0.25, np.float32)
    for Q, bounds, expected in [
        (gram, narrow, [0.15, 0.15, 0.35, 0.35]),
        (gram, one, eye[2]),
        (gram, (point, point), point),
        (gram, (0 * point, 0 * point + 0.5), [0, 0, 0.5, 0.5]),
        (eye, narrow, point),
    ]:
        w = simplex_qp(Q, bounds=bounds)
        np.testing.assert_allclose(w, expected, atol=1e-6)
        assert simplex_qp_residual(Q, w, None, None, bounds) < 1e-6
    wrong = np.array([0.35, 0.15, 0.15, 0.35], np.float32)
    assert simplex_qp_residual(gram, wrong, None, None, narrow) > 1e-2
    assert simplex_qp_residual(gram, eye[2], None, None, narrow) > 0.5
    assert np.isnan(simplex_qp(np.nan * eye, bounds=narrow)).all()
    absent = np.array([True, False, True, True])
    w = simplex_qp(eye, mask=absent, bounds=narrow)
    np.testing.assert_allclose(w, [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-6)
