"""Solvers of the small problems in one variable per task behind the methods.

They are exact up to rounding errors, also for nearly dependent and badly scaled
gradients, indifferent to the scale of the Gram matrix (there is no need to normalise
it), and finite where the solution is not unique. NaN in gives NaN out. Each has a
residual: the largest violation of its optimality conditions, relative to the terms in
them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def normalize_gram(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides a Gram matrix by its trace; an all-zero matrix stays zero.

    Args:
      gram: inner products of the task gradients, of shape (T, T).

    Returns:
      The normalised matrix and the trace.
    """
    trace = jnp.trace(gram)
    return gram / _positive(trace), trace


def project_simplex(v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    r"""Euclidean projection onto :math:`\{w \ge 0, \sum_i w_i = 1\}`.

    Args:
      v: the point to project, of shape (T,).
      mask: entries that may be positive, of shape (T,); all by default.

    Returns:
      The nearest weights; those outside the mask are zero.

    Examples:
      >>> print(project_simplex(jnp.array([0.5, 2.0, 1.5])))
      [0.   0.75 0.25]
    """
    mask = jnp.ones(v.shape, bool) if mask is None else mask
    # Shifting by the largest entry changes nothing, and keeps small gaps exact. What
    # lies 1 below it or more gets no weight.
    top = jnp.max(jnp.where(mask, v, jnp.finfo(v.dtype).min))
    v = jnp.where(mask, v - top, -2)
    descending = -jnp.sort(-v)
    count = jnp.arange(1, len(v) + 1, dtype=v.dtype)
    thresholds = (jnp.cumsum(descending) - 1) / count
    threshold = jnp.max(jnp.where(descending > thresholds, thresholds, thresholds[0]))
    return jnp.where(mask, jnp.maximum(v - threshold, 0), 0)


def nonnegative_qp(Q: jax.Array, q: jax.Array) -> jax.Array:
    r"""Solves :math:`\min_{x \ge 0} \tfrac12 x^\top Q x - q^\top x`.

    Args:
      Q: symmetric positive semi-definite matrix, of shape (T, T). The variable of
        a zero row is zero.
      q: linear term, of shape (T,).

    Returns:
      A minimiser, of shape (T,); large and finite if there is none.

    Examples:
      >>> Q = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> print(nonnegative_qp(Q, jnp.array([1.0, -1.0])))
      [0.5 0. ]
    """
    Q, q = _compute(Q, q)
    return _active_set(Q, q, jnp.zeros_like(q))


def simplex_qp(
    Q: jax.Array, q: jax.Array | None = None, mask: jax.Array | None = None
) -> jax.Array:
    r"""Solves :math:`\min_w \tfrac12 w^\top Q w + q^\top w` over the simplex.

    Args:
      Q: symmetric positive semi-definite matrix, of shape (T, T).
      q: linear term, of shape (T,); zero by default.
      mask: entries that may be positive, of shape (T,); all by default.

    Returns:
      Weights that are not negative and sum to one, of shape (T,).

    Examples:
      >>> gram = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> print(jnp.array_str(simplex_qp(gram), precision=4))
      [0.6 0.4]
    """
    q = jnp.zeros(len(Q), Q.dtype) if q is None else q
    Q, q = _compute(Q, q)
    mask = jnp.ones(q.shape, bool) if mask is None else mask
    return _active_set(Q, -q, jnp.zeros_like(q), mask, on_simplex=True)


def dual_cone(
    gram: jax.Array, lower: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    r"""Solves :math:`\min_v v^\top M v` subject to :math:`v \ge` ``lower``.

    The combination of the gradients with weights ``v`` is the projection of their
    combination with weights ``lower`` onto the dual cone of the gradients, the
    directions that conflict with none of them. It is never longer than what is
    projected, also where the gradients are dependent.

    Args:
      gram: inner products of the task gradients, of shape (T, T).
      lower: weights before the projection, of shape (T,).
      mask: the gradients that the projection is not to conflict with, of shape (T,);
        all by default. The weights of the others stay as they are.

    Returns:
      Weights of the projection, of shape (T,).

    Examples:
      >>> gram = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> print(jnp.array_str(dual_cone(gram, jnp.array([1.0, 0.0])), precision=4))
      [1.     0.5789]
    """
    gram, lower = _compute(gram, lower)
    return _active_set(gram, jnp.zeros_like(lower), lower, mask)


@jax.jit
def simplex_cone_program(
    gram: jax.Array,
    b: jax.Array,
    c: jax.typing.ArrayLike,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Solves :math:`\min_w b^\top w + c \sqrt{w^\top M w}` over the simplex.

    Args:
      gram: symmetric positive semi-definite matrix, of shape (T, T).
      b: linear term, of shape (T,).
      c: weight of the norm, not negative.
      mask: entries that may be positive, of shape (T,); all by default.

    Returns:
      Weights that are not negative and sum to one, of shape (T,).

    Examples:
      >>> gram = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> w = simplex_cone_program(gram, jnp.zeros(2), 1.0)
      >>> print(jnp.array_str(w, precision=4))
      [0.8 0.2]
    """
    gram, b = _compute(gram, b)
    eps = jnp.finfo(gram.dtype).eps
    unit = power_of_two(jnp.sqrt(_positive(jnp.trace(gram))))
    M, b = gram / unit / unit, b / unit
    c2 = jnp.maximum(jnp.asarray(c, M.dtype) ** 2, eps**4)
    zero = jnp.zeros_like(b)
    mask = jnp.ones(b.shape, bool) if mask is None else mask

    # With s the norm of the solution, w minimises w'Mw / 2 + (s / c) b'w. For a given
    # z = (s / c)^2, G(z) = w'Mw is linear in z as long as the same weights are
    # positive, and G(z) / z falls. So G(z) = c^2 z has one solution z > 0 at most,
    # found by secants; where they do not help, by bisection of the exponent.
    def solve(z, start):
        w = _active_set(M, -jnp.sqrt(z) * b, zero, mask, start, on_simplex=True)
        return w, jnp.maximum(_inner(w, _dot(M, w, zero, zero)), 0)

    def body(carry):
        w, z, G, previous_z, previous_G, low, high, _, count = carry
        fixed_point = G / c2  # Between z and the solution.
        low = jnp.where(fixed_point >= z, jnp.maximum(fixed_point, low), low)
        high = jnp.where(fixed_point <= z, jnp.minimum(fixed_point, high), high)
        slope = (G - previous_G) / _positive(z - previous_z)
        secant = (G - slope * z) / _positive(c2 - slope)
        error, previous_error = G - c2 * z, previous_G - c2 * previous_z
        helps = 2 * jnp.abs(error / z) < jnp.abs(previous_error / previous_z)
        new_z = jnp.where(
            helps & (secant >= low) & (secant <= high),
            secant,
            jnp.sqrt(low) * jnp.sqrt(high),
        )
        new_w, new_G = solve(new_z, w)
        floor = eps**2 * _inner(new_w**2, jnp.diagonal(M))
        going = jnp.abs(new_G - c2 * new_z) > 4 * eps * new_G + floor
        return new_w, new_z, new_G, z, G, low, high, going, count + 1

    low, high = eps**4 / c2, jnp.max(jnp.diagonal(M)) / c2
    w = mask / _positive(jnp.sum(mask, dtype=b.dtype))
    # Where the gradients cancel, rounding errors can make w'Mw negative.
    z = jnp.clip(_inner(w, _dot(M, w, zero, zero)) / c2, low, jnp.maximum(low, high))
    w, G = solve(z, w)
    carry = _vary(jnp.isfinite(G), (w, z, G, z, G, low, high, True, 0))
    w, *_ = lax.while_loop(lambda c: c[-2] & (c[-1] < 60), body, carry)
    return w


@jax.jit
def fairness(
    gram: jax.Array,
    alpha: jax.typing.ArrayLike,
    preference: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Solves :math:`(M a)_i = p_i a_i^{-1/\alpha}` for :math:`a > 0`.

    These are the optimality conditions of alpha-fairness, and for ``alpha=1`` of the
    Nash bargaining solution.

    Args:
      gram: inner products of the task gradients, of shape (T, T).
      alpha: exponent of fairness, in (0, 10] or so.
      preference: weights of the tasks, of shape (T,); ones by default.
      mask: tasks that take part, of shape (T,); all by default. A task without a
        gradient or without a preference never does.

    Returns:
      The weights, of shape (T,), zero for tasks that take no part. There are none if
      a convex combination of the gradients vanishes; the weights returned are then
      large and finite, and their combination is small.

    Examples:
      >>> gram = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> print(jnp.array_str(fairness(gram, 1.0), precision=4))
      [0.5915 0.4071]
    """
    p = jnp.ones(len(gram), gram.dtype) if preference is None else preference
    M, p = _compute(gram, p)
    eps = jnp.finfo(M.dtype).eps
    alpha = jnp.asarray(alpha, M.dtype)
    unit = power_of_two(_positive(jnp.trace(M)))
    M = M / unit
    active = (jnp.diagonal(M) > 0) & (p > 0)
    active = active if mask is None else active & mask
    both = jnp.outer(active, active)
    M = jnp.where(both, M, 0)
    identity = jnp.eye(len(p), dtype=M.dtype)

    # Newton's method on the convex a'Ma / 2 - sum p a^(1 - 1/alpha) / (1 - 1/alpha),
    # for the relative change of a. Exact at once for orthogonal gradients.
    def gradient(a):
        return jnp.where(active, a * (_dot(M, a, 0 * a, 0 * a)), 0)

    def target(a):
        return jnp.where(active, p * a ** (1 - 1 / alpha), 0)

    def body(carry):
        a, _, count = carry
        b = target(a)
        r = b - gradient(a)
        H = jnp.outer(a, a) * M + jnp.diag(b / alpha)
        scale = 1 / jnp.sqrt(jnp.where(active, jnp.diagonal(H), 1))
        H = jnp.where(both, jnp.outer(scale, scale) * H, identity)
        L = jnp.linalg.cholesky(H + 4 * eps * identity, symmetrize_input=False)
        change = scale * jax.scipy.linalg.cho_solve((L, True), scale * r)
        decrement = _inner(r, change)

        # Halve the step until the slope along it is no longer steeply upwards.
        def overshoots(step):
            new = a * (1 + step * change)
            slope = _inner((gradient(new) - target(new)) / new, a * change)
            return (slope > decrement / 2) & (step > 1e-4)

        shrink = jnp.max(-change)
        step = jnp.where(shrink > 0.99, 0.99 / shrink, 1)
        # The verdict is carried: under vmap a condition is computed twice, and where
        # rounding errors make it differ the loop would not end.
        step, _ = lax.while_loop(
            lambda carry: carry[1],
            lambda carry: (carry[0] / 2, overshoots(carry[0] / 2)),
            (step, overshoots(step)),
        )
        tolerance = 4 * eps**2 * (1 + alpha) * jnp.sum(b)
        new = a * (1 + step * change)
        # The factorisation fails when the weights diverge: keep the last.
        solved = jnp.all(jnp.isfinite(new))
        going = solved & (decrement > tolerance) & jnp.all(new < a0 / eps)
        new = jnp.where(solved, new, a)
        return new, going, count + 1

    ratio = jnp.where(active, p / _positive(jnp.diagonal(M)), 1)
    a0 = ratio ** (alpha / (1 + alpha))
    carry = _vary(jnp.all(jnp.isfinite(a0)), (a0, True, 0))
    a, *_ = lax.while_loop(lambda c: c[1] & (c[2] < 60), body, carry)
    a = jnp.where(active, a * unit ** (-alpha / (1 + alpha)), 0)
    return jnp.where(jnp.all(jnp.isfinite(gram)), a, jnp.nan)


def pinv(gram: jax.Array) -> jax.Array:
    """Pseudo-inverse of a symmetric positive semi-definite matrix.

    Eigenvalues below ``T * eps`` times the largest count as zero. Its products are
    less accurate than :func:`pinv_solve` where gradients are nearly dependent.

    Args:
      gram: the matrix, of shape (T, T).

    Returns:
      Its pseudo-inverse, of shape (T, T).

    Examples:
      >>> print(jnp.array_str(pinv(jnp.ones((2, 2))), precision=4))
      [[0.25 0.25]
       [0.25 0.25]]
    """
    (gram,) = _compute(gram)
    inverse, vectors, _ = _eigen(gram)
    return _matmul(vectors * inverse[None], vectors.T)


def pinv_solve(gram: jax.Array, b: jax.Array) -> jax.Array:
    """Product of the pseudo-inverse of a matrix, as in :func:`pinv`, and a vector.

    Args:
      gram: symmetric positive semi-definite matrix, of shape (T, T).
      b: the vector, of shape (T,).

    Returns:
      The least-squares solution of least norm of ``gram @ x = b``, of shape (T,).

    Examples:
      >>> x = pinv_solve(jnp.ones((2, 2)), jnp.array([1.0, 3.0]))
      >>> print(jnp.array_str(x, precision=4))
      [1. 1.]
    """
    gram, b = _compute(gram, b)
    inverse, vectors, null = _eigen(gram)
    b = b - _matmul(null, _matmul(null.T, b))

    # Iterative refinement, with accurate residuals.
    def refine(_, carry):
        x, x_low = carry
        residual = -_dot(gram, x, x_low, -b)
        move = _matmul(vectors, inverse * _matmul(vectors.T, residual))
        x, error = _two_sum(x, move)
        return _two_sum(x, error + x_low)

    x, _ = lax.fori_loop(0, 4, refine, (0 * b, 0 * b))
    return x


def _eigen(gram):
    """Inverse eigenvalues (0 in the null space), eigenvectors, null vectors."""
    values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
    kept = values > len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return inverse, vectors, jnp.where(kept[None], 0, vectors)


_matmul = functools.partial(jnp.matmul, precision="highest")


def project_simplex_residual(
    v: jax.Array, w: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Violation of the optimality conditions of :func:`project_simplex`."""
    return simplex_qp_residual(jnp.eye(len(v), dtype=v.dtype), w, -v, mask)


def nonnegative_qp_residual(Q: jax.Array, q: jax.Array, x: jax.Array) -> jax.Array:
    """Violation of the optimality conditions of :func:`nonnegative_qp`."""
    return _bound_residual(Q, q, x, jnp.zeros_like(x))


def dual_cone_residual(gram: jax.Array, lower: jax.Array, v: jax.Array) -> jax.Array:
    """Violation of the optimality conditions of :func:`dual_cone`."""
    return _bound_residual(gram, jnp.zeros_like(v), v, lower)


def _bound_residual(Q, q, x, lower):
    """Largest violation, in units of diag(Q) and of the terms in each condition."""
    root = jnp.sqrt(_positive(jnp.diagonal(Q)))
    gradient = _dot(Q, x, 0 * x, -q)
    size = jnp.max((jnp.abs(Q) @ jnp.abs(x) + jnp.abs(q)) / root)
    violation = jnp.minimum((x - lower) * root, gradient / root)
    violation = jnp.where(jnp.diagonal(Q) > 0, violation, 0)
    return jnp.max(jnp.abs(violation)) / _positive(size)


def simplex_qp_residual(
    Q: jax.Array,
    w: jax.Array,
    q: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Violation of the optimality conditions of :func:`simplex_qp`."""
    q = jnp.zeros_like(w) if q is None else q
    mask = jnp.ones(w.shape, bool) if mask is None else mask
    gradient = _dot(Q, w, 0 * w, q)
    sizes = jnp.abs(Q) @ w + jnp.abs(q)
    size = _inner(w, sizes)
    gap = gradient - _inner(w, gradient)
    descent = jnp.max(jnp.where(mask, -gap, 0) / _positive(sizes + size))
    slack = _inner(w, jnp.abs(gap)) / _positive(size)
    outside = jnp.sum(jnp.abs(jnp.where(mask, jnp.minimum(w, 0), w)))
    return descent + slack + jnp.abs(jnp.sum(w) - 1) + outside


def simplex_cone_program_residual(
    gram: jax.Array,
    b: jax.Array,
    c: jax.typing.ArrayLike,
    w: jax.Array,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Violation of the optimality conditions of :func:`simplex_cone_program`."""
    norm = jnp.sqrt(jnp.maximum(_inner(w, _dot(gram, w, 0 * w, 0 * w)), 0))
    return simplex_qp_residual(jnp.asarray(c) * gram, w, norm * b, mask)


def fairness_residual(
    gram: jax.Array,
    alpha: jax.typing.ArrayLike,
    a: jax.Array,
    preference: jax.Array | None = None,
) -> jax.Array:
    """Violation of the equations of :func:`fairness`, by the tasks that take part."""
    p = jnp.ones_like(a) if preference is None else preference
    target = jnp.where(a > 0, p * jnp.where(a > 0, a, 1) ** (-1 / alpha), 0)
    size = jnp.abs(gram) @ a + target
    violation = jnp.abs(_dot(gram, a, 0 * a, -target))
    return _inner(a, violation) / _positive(_inner(a, size))


def pinv_solve_residual(gram: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    """Violation of the normal equations of :func:`pinv_solve`."""
    residual = _dot(gram, x, 0 * x, -b)
    size = jnp.linalg.norm(gram) * (jnp.abs(gram) @ jnp.abs(x) + jnp.abs(b))
    return jnp.max(jnp.abs(_matmul(gram, residual))) / _positive(jnp.max(size))


def pinv_residual(gram: jax.Array, inverse: jax.Array) -> jax.Array:
    """Violation of the Penrose equations by a symmetric :func:`pinv`."""
    product = _matmul(gram, inverse)
    first = jnp.linalg.norm(_matmul(product, gram) - gram)
    second = jnp.linalg.norm(_matmul(inverse, product) - inverse)
    return jnp.maximum(
        first / _positive(jnp.linalg.norm(gram)),
        second / _positive(jnp.linalg.norm(inverse)),
    )


def _positive(x):
    """Replaces zeros by ones, for divisions where the numerator is zero, too."""
    return jnp.where(x == 0, 1, x)


def _vary(data, carry):
    """Lets a carry vary over the mesh axes of the data, for shard_map."""
    return jax.tree.map(lambda x: jnp.where(data, x, x), carry)


def _compute(*arrays):
    """Casts to the common dtype, float32 at least."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def _two_sum(a, b):
    """Sum of two numbers and its rounding error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _dot(Q, x_high, x_low, start):
    """Computes ``start + Q @ (x_high + x_low)`` without cancellation."""
    return sum(_dot_pair(Q, x_high, x_low, start))


def _dot_pair(Q, x_high, x_low, start):
    """As ``_dot``, as a sum of two numbers, to 3/2 the working precision or more.

    Halves of the numbers have products without rounding errors, which are summed in
    pairs. Where gradients nearly cancel, the working precision is not enough.
    """
    info = jnp.finfo(Q.dtype)
    halve = lambda a: lax.reduce_precision(a, info.nexp, (info.nmant - 1) // 2)
    x_high, x_low = x_high[None], x_low[None]
    Q1, x1 = halve(Q), halve(x_high)
    Q2, x2 = Q - Q1, x_high - x1

    def add(a, b):
        s, error = _two_sum(a[0], b[0])
        return s, error + a[1] + b[1]

    zero = jnp.zeros((), Q.dtype)
    pairs = (Q1 * x1, Q1 * x2 + Q2 * x1 + Q2 * x2 + Q * x_low)
    high, low = lax.reduce(pairs, (zero, zero), add, (Q.ndim - 1,))
    high, error = _two_sum(high, start)
    return high, low + error


def _inner(u, v):
    """Inner product, at full precision on any device."""
    return jnp.sum(u * v)


def power_of_two(x):
    """The power of two next to x > 0: scaling by it is free of rounding errors."""
    _, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.ones_like(x), exponent)


def _admm(Q, q, lower, allowed):
    """Minimises x'Qx/2 - q'x over x >= lower by ADMM: x, and its relative violation.

    As in OSQP (Stellato et al., 2020), with its rule for the penalty. As only Q is
    factorised, problems that share Q share that under vmap, and their iterations are
    products of matrices. Every few of them start again from an accurate gradient, and
    in between only the changes are computed, so that x has more digits than the working
    precision. For Q that is indefinite by more than rounding errors, x is ``lower``.
    """
    eps, relaxation = jnp.finfo(Q.dtype).eps, 1.6
    values, vectors = jnp.linalg.eigh(Q, symmetrize_input=False)
    noise = 16 * eps * len(q)  # Of the eigenvalues.
    norm = jnp.linalg.norm

    def violation_of(x, gradient):
        size = jnp.max(_matmul(jnp.abs(Q), jnp.abs(x)) + jnp.abs(q))
        violation = jnp.where(allowed, jnp.minimum(x - lower, gradient), 0)
        return jnp.max(jnp.abs(violation)) / _positive(size)

    def iterate_and_adapt(carry):
        z, z_low, u, penalty, gradient, before, _, count = carry
        slope = gradient + penalty * u
        room = (lower - z) - z_low

        def iterate(_, carry):
            move, du, _, _ = carry
            x = _matmul(vectors.T, penalty * (move - du) - slope)
            x = _matmul(vectors, x / (jnp.maximum(values, 0) + penalty))
            relaxed = relaxation * x + (1 - relaxation) * move
            free = allowed & (relaxed + (u + du) > room)
            new = jnp.where(free, relaxed + (u + du), room)
            return new, jnp.where(free, -u, du + relaxed - new), x, new - move

        zero = jnp.zeros_like(q + u + slope)
        move, du, x, change = lax.fori_loop(0, 25, iterate, (zero,) * 4)
        new, error = _two_sum(z, move)
        new, new_low = _two_sum(new, error + z_low)
        u = u + du
        high, low = _dot_pair(Q, new, new_low, -q)
        gradient = high + low
        violation = violation_of(new, gradient)
        # Where it no longer falls, rounding errors of Q hide the digits that are left.
        ends = (before <= 8 * eps) & (violation >= 0.75 * before)
        z, z_low = jnp.where(ends, z, new), jnp.where(ends, z_low, new_low)
        violation = jnp.where(ends, before, violation)
        going = (violation > 8 * eps**1.5) & ~ends
        primal = norm(x - move) / _positive(norm(z))
        terms = jnp.stack([norm(gradient + q), norm(penalty * u), norm(q)])
        dual = norm(penalty * change) / _positive(jnp.max(terms))
        factor = jnp.clip(jnp.sqrt(primal / _positive(dual)), 0.1, 10)
        factor = jnp.where((factor > 0.5) & (factor < 2), 1, factor)
        new = jnp.clip(factor * penalty, 1e-4 + noise, 1e2)
        u = u * penalty / new
        return z, z_low, u, new, gradient, violation, going, count + 1

    gradient = _dot(Q, lower, 0 * lower, -q)
    start = violation_of(lower, gradient)
    going = (start > 8 * eps**1.5) & (values[0] > -noise)
    penalty = jnp.asarray(0.3, Q.dtype)
    carry = lower, 0 * q, 0 * q, penalty, gradient, start, going, 0
    z, _, _, _, _, violation, _, _ = lax.while_loop(
        lambda c: c[-2] & (c[-1] < 16),
        iterate_and_adapt,
        _vary(start, carry),
    )
    return z, violation


def _exchange(Q, q, a, allowed, newton):
    """Guesses the minimiser on the simplex, exchanging all wrong free variables."""
    size, eps = len(q), jnp.finfo(Q.dtype).eps

    def exchange(carry):
        free, _, fewest, patience, count = carry
        x = newton(free, q, 1, 100 * eps)
        r = q - jnp.sum(Q * x[None], 1)
        r = r - a * _inner(r, x)
        tolerance = 100 * eps * jnp.max(jnp.abs(q) + jnp.abs(q - r))
        wrong = jnp.where(free, x < 0, allowed & (r > tolerance))
        number = jnp.sum(wrong)
        patience = jnp.where(number < fewest, 3, patience - 1)
        return free ^ wrong, x, jnp.minimum(number, fewest), patience, count + 1

    _, x, *_ = lax.while_loop(
        lambda c: (c[2] > 0) & (c[3] > 0) & (c[4] < 20),
        exchange,
        _vary(q[0], (allowed, 0 * q, size + 1, 3, 0)),
    )
    guess = jnp.maximum(x, 0)
    return guess / _inner(a, guess)


@functools.partial(jax.jit, static_argnames="on_simplex")
def _active_set(Q, q, lower, mask=None, start=None, on_simplex=False):
    """Minimises x'Qx/2 - q'x over x >= lower, and sum(x) = 1 if on_simplex.

    A primal active-set method (Lawson and Hanson's): x moves to the minimiser over
    the free variables, until one of them meets its bound and is freed no more; in a
    minimiser, the variable with the steepest descent is freed. Each move is computed
    from an accurate residual, which makes moves on the same face a refinement, and a
    small regularization of the factorised matrix harmless.

    Where Q is singular, as for more gradients than dimensions, rounding errors in it
    look like directions of endless descent. So x is first pulled, by as much as they
    amount to, to its bounds or, where there are many variables, to a solution that
    cannot be long, which limits it: it is close to optimal in any case. A few moves
    without the pull then give the digits where Q determines them; where they make x
    four times as long, it does not.
    """
    eps = jnp.finfo(Q.dtype).eps
    size = len(q)
    diagonal = jnp.diagonal(Q)
    allowed = jnp.ones(q.shape, bool) if mask is None else mask
    if not on_simplex:
        allowed = allowed & (diagonal > 0)
    # Unknowns scaled to a diagonal near one; a = 1 in the scaled unknowns.
    spread = jnp.max(jnp.abs(q - jnp.mean(q, where=allowed)), where=allowed, initial=0)
    floor = eps * spread if on_simplex else 0
    level = jnp.maximum(diagonal, floor)
    scale = 1 / power_of_two(jnp.sqrt(jnp.where(level > 0, level, 1)))
    Q = Q * jnp.outer(scale, scale)
    q = q * scale
    lower = lower / scale
    a = scale
    first = lower
    if start is not None:
        first = start / scale
    elif on_simplex:
        values = jnp.where(allowed, jnp.diagonal(Q) / (2 * a * a) - q / a, jnp.inf)
        best = jnp.arange(size) == jnp.argmin(values)
        first = jnp.where(best, 1 / a, 0)
    finite = jnp.all(jnp.isfinite(Q)) & jnp.all(jnp.isfinite(q + lower + first))
    normal = a / jnp.max(a, where=allowed, initial=0)  # Adds a multiple of (a'x-1)^2.
    K = Q + jnp.outer(normal, normal) if on_simplex else Q
    identity = jnp.eye(size, dtype=Q.dtype)

    def solve(free, b, ridge):
        both = jnp.outer(free, free)
        L = jnp.linalg.cholesky(
            jnp.where(both, K + ridge * identity, identity), symmetrize_input=False
        )
        b = jnp.where(free[:, None], b, 0)
        b = lax.linalg.triangular_solve(L, b, left_side=True, lower=True)
        return lax.linalg.triangular_solve(
            L, b, left_side=True, lower=True, transpose_a=True
        )

    def newton(free, reduced, gap, ridge):
        if not on_simplex:
            return solve(free, reduced[:, None], ridge)[:, 0]
        y = solve(free, jnp.stack([reduced, a], 1), ridge)
        return y[:, 0] + (gap - _inner(a, y[:, 0])) / _inner(a, y[:, 1]) * y[:, 1]

    limited = not on_simplex  # The simplex itself limits x.
    pulled, settled, centre = jnp.asarray(limited), jnp.asarray(False), lower
    if start is None and size > 8 and on_simplex:
        x = _exchange(Q, q, a, allowed, newton)
        first = jnp.where(jnp.all(jnp.isfinite(x)), x, first)
    elif start is None and size > 8:
        first, violation = _admm(Q, q, lower, allowed)
        centre = first
        curvature = _inner(first, jnp.sum(Q * first[None], 1))
        terms = _inner(jnp.abs(first), jnp.sum(jnp.abs(Q * first[None]), 1))
        cancels = curvature <= eps * terms
        settled = violation <= jnp.where(cancels, 8 * eps, 8 * eps**1.5)
        sound = curvature > eps**0.5 * _inner(first, first)
        pulled = ~(sound & (violation <= 8 * eps))

    def body(carry):
        x, x_low, free, ridge, pulled, safe, full_steps, _, left = carry
        high, low = _dot_pair(Q, x, x_low, -q)
        Qx = q + (high + low)
        reduced = -(high + low)
        if on_simplex:  # The common level is much larger than the differences.
            reduced = -(high - a * _inner(high, x) + low)
            reduced = reduced - a * _inner(reduced, x)
        pull = jnp.where(pulled, ridge, 0)
        reduced = reduced - pull * (x - centre)
        # Free the variable of steepest descent, if this is a minimiser of the face.
        on_face = jnp.max(jnp.abs(reduced), where=free, initial=0)
        noise = eps**1.5 * jnp.max(jnp.abs(Qx) + jnp.abs(q))
        noise = jnp.where(pulled, noise + eps * jnp.max(jnp.abs(x)), noise)
        steepest = jnp.where(allowed & ~free, reduced, 0)
        entering = jnp.argmax(steepest)
        enters = (full_steps > 0) & (steepest[entering] > 4 * on_face + noise)
        entered = enters & (jnp.arange(size) == entering)
        free = free | entered
        # The move to the minimiser over the free variables.
        gap = 1 - _dot(a[None], x, x_low, jnp.zeros((1,), Q.dtype))[0]
        move = newton(free, reduced, gap, ridge)
        norm2 = _inner(x, Qx)
        # Indefinite by more than was thought.
        indefinite = pulled & (norm2 < -ridge / 2 * _inner(x, x))
        failed = ~jnp.all(jnp.isfinite(move)) | indefinite
        ridge = jnp.where(failed, 16 * ridge, ridge)
        move = jnp.where(free & ~failed, move, 0)
        # Between very different scales, its sign may be a rounding error.
        move = jnp.where(entered, jnp.maximum(move, 0), move)
        decrement = _inner(move, reduced)
        room = jnp.maximum(x - lower, 0)
        blocking = free & (room + move < 0)
        ratio = jnp.where(blocking, room / jnp.where(blocking, -move, 1), jnp.inf)
        step = jnp.minimum(jnp.min(ratio), 1)
        blocked = blocking & (ratio <= step)
        new, error = _two_sum(x, step * move)
        new, new_low = _two_sum(new, error + x_low)
        new = jnp.where(blocked, lower, new)
        new_low = jnp.where(blocked, 0, new_low)
        full_steps = jnp.where(jnp.any(blocked), 0, full_steps + 1)
        floor = jnp.where(pulled, eps**2, eps**3)
        big = (16 * eps) ** 2 * norm2 + floor * _inner(x, x)
        going = failed | enters | (full_steps < 2) | (decrement > big)
        # Let go of x; or take it back.
        released = pulled & (~going | (left == 1))
        far = ~pulled & (jnp.linalg.norm(new) > 4 * jnp.linalg.norm(safe))
        new = jnp.where(far & limited, safe, new)
        safe = jnp.where(released, new, safe)
        going = released | (going & ~(far & limited))
        left = jnp.where(released, 8, left - 1)
        free, pulled = free & ~blocked, pulled & ~released
        return new, new_low, free, ridge, pulled, safe, full_steps, going, left

    free = allowed & (first > lower)
    ridge = jnp.asarray(4 * size**0.5 * eps, Q.dtype)
    left = jnp.where(pulled | on_simplex, 4 * size + 20, 8)
    carry = (first, 0 * first, free, ridge, pulled, first, 1, finite & ~settled, left)
    x, *_ = lax.while_loop(lambda c: c[-2] & (c[-1] > 0), body, _vary(finite, carry))
    x = jnp.maximum(x, lower) * scale
    return jnp.where(finite, x, jnp.nan)
