"""Convex quadratic programs with bounds, or on the simplex: ADMM and active sets."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from optax_mtl.precise import (
    dot,
    dot_pair,
    inner,
    matmul,
    positive,
    power_of_two,
    two_sum,
    vary,
)


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
        size = jnp.max(matmul(jnp.abs(Q), jnp.abs(x)) + jnp.abs(q))
        violation = jnp.where(allowed, jnp.minimum(x - lower, gradient), 0)
        return jnp.max(jnp.abs(violation)) / positive(size)

    def iterate_and_adapt(carry):
        z, z_low, u, penalty, gradient, before, _, count = carry
        slope = gradient + penalty * u
        room = (lower - z) - z_low

        def iterate(_, carry):
            move, du, _, _ = carry
            x = matmul(vectors.T, penalty * (move - du) - slope)
            x = matmul(vectors, x / (jnp.maximum(values, 0) + penalty))
            relaxed = relaxation * x + (1 - relaxation) * move
            free = allowed & (relaxed + (u + du) > room)
            new = jnp.where(free, relaxed + (u + du), room)
            return new, jnp.where(free, -u, du + relaxed - new), x, new - move

        zero = jnp.zeros_like(q + u + slope)
        move, du, x, change = lax.fori_loop(0, 25, iterate, (zero,) * 4)
        new, error = two_sum(z, move)
        new, new_low = two_sum(new, error + z_low)
        u = u + du
        high, low = dot_pair(Q, new, new_low, -q)
        gradient = high + low
        violation = violation_of(new, gradient)
        # Where it no longer falls, rounding errors of Q hide the digits that are left.
        ends = (before <= 8 * eps) & (violation >= 0.75 * before)
        z, z_low = jnp.where(ends, z, new), jnp.where(ends, z_low, new_low)
        violation = jnp.where(ends, before, violation)
        going = (violation > 8 * eps**1.5) & ~ends
        primal = norm(x - move) / positive(norm(z))
        terms = jnp.stack([norm(gradient + q), norm(penalty * u), norm(q)])
        dual = norm(penalty * change) / positive(jnp.max(terms))
        factor = jnp.clip(jnp.sqrt(primal / positive(dual)), 0.1, 10)
        factor = jnp.where((factor > 0.5) & (factor < 2), 1, factor)
        new = jnp.clip(factor * penalty, 1e-4 + noise, 1e2)
        u = u * penalty / new
        return z, z_low, u, new, gradient, violation, going, count + 1

    gradient = dot(Q, lower, 0 * lower, -q)
    start = violation_of(lower, gradient)
    going = (start > 8 * eps**1.5) & (values[0] > -noise)
    penalty = jnp.asarray(0.3, Q.dtype)
    carry = lower, 0 * q, 0 * q, penalty, gradient, start, going, 0
    z, _, _, _, _, violation, _, _ = lax.while_loop(
        lambda c: c[-2] & (c[-1] < 16),
        iterate_and_adapt,
        vary(start, carry),
    )
    return z, violation


def _exchange(Q, q, a, allowed, newton):
    """Guesses the minimiser on the simplex, exchanging all wrong free variables."""
    size, eps = len(q), jnp.finfo(Q.dtype).eps

    def exchange(carry):
        free, _, fewest, patience, count = carry
        x = newton(free, q, 1, 100 * eps)
        r = q - jnp.sum(Q * x[None], 1)
        r = r - a * inner(r, x)
        tolerance = 100 * eps * jnp.max(jnp.abs(q) + jnp.abs(q - r))
        wrong = jnp.where(free, x < 0, allowed & (r > tolerance))
        number = jnp.sum(wrong)
        patience = jnp.where(number < fewest, 3, patience - 1)
        return free ^ wrong, x, jnp.minimum(number, fewest), patience, count + 1

    _, x, *_ = lax.while_loop(
        lambda c: (c[2] > 0) & (c[3] > 0) & (c[4] < 20),
        exchange,
        vary(q[0], (allowed, 0 * q, size + 1, 3, 0)),
    )
    guess = jnp.maximum(x, 0)
    return guess / inner(a, guess)


@functools.partial(jax.jit, static_argnames="on_simplex")
def active_set(Q, q, lower, mask=None, start=None, on_simplex=False, upper=None):
    """Minimises x'Qx/2 - q'x over x >= lower, and sum(x) = 1 if on_simplex.

    Upper bounds are for the simplex alone, and need a start between the bounds.

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
    if upper is not None:
        upper = upper / scale
        allowed = allowed & (lower < upper)
    first = lower
    if start is not None:
        first = start / scale
    elif on_simplex:
        values = jnp.where(allowed, jnp.diagonal(Q) / (2 * a * a) - q / a, jnp.inf)
        best = jnp.arange(size) == jnp.argmin(values)
        first = jnp.where(best, 1 / a, 0)
    finite = jnp.all(jnp.isfinite(Q)) & jnp.all(jnp.isfinite(q + lower + first))
    identity = jnp.eye(size, dtype=Q.dtype)

    def solve(K, free, b, ridge):
        both = jnp.outer(free, free)
        L = jnp.linalg.cholesky(
            jnp.where(both, K + ridge * identity, identity), symmetrize_input=False
        )
        b = jnp.where(free, b, 0)[:, None]
        b = lax.linalg.triangular_solve(L, b, left_side=True, lower=True)
        x = lax.linalg.triangular_solve(
            L, b, left_side=True, lower=True, transpose_a=True
        )
        return x[:, 0]

    def newton(free, reduced, gap, ridge):
        if not on_simplex:
            return solve(Q, free, reduced, ridge)
        # One variable follows from the others by the sum; that with the largest
        # coefficient, so that none of theirs is made larger.
        pivot = jnp.argmax(jnp.where(free, a, 0))
        others = free & (jnp.arange(size) != pivot)
        ratio = jnp.where(others, a / a[pivot], 0)
        row = Q[pivot]
        K = Q - jnp.outer(ratio, row) - jnp.outer(row, ratio)
        K = K + row[pivot] * jnp.outer(ratio, ratio)
        b = reduced - row * (gap / a[pivot])
        y = solve(K, others, b - ratio * b[pivot], ridge)
        last = (gap - inner(a, y)) / a[pivot]
        return jnp.where(jnp.arange(size) == pivot, last, y)

    limited = not on_simplex  # The simplex itself limits x.
    pulled, settled, centre = jnp.asarray(limited), jnp.asarray(False), lower
    if start is None and size > 8 and on_simplex:
        x = _exchange(Q, q, a, allowed, newton)
        first = jnp.where(jnp.all(jnp.isfinite(x)), x, first)
    elif start is None and size > 8:
        first, violation = _admm(Q, q, lower, allowed)
        centre = first
        curvature = inner(first, jnp.sum(Q * first[None], 1))
        terms = inner(jnp.abs(first), jnp.sum(jnp.abs(Q * first[None]), 1))
        cancels = curvature <= eps * terms
        settled = violation <= jnp.where(cancels, 8 * eps, 8 * eps**1.5)
        sound = curvature > eps**0.5 * inner(first, first)
        pulled = ~(sound & (violation <= 8 * eps))

    def body(carry):
        x, x_low, free, ridge, pulled, safe, full_steps, _, left = carry
        high, low = dot_pair(Q, x, x_low, -q)
        Qx = q + (high + low)
        reduced = -(high + low)
        if on_simplex:  # The common level is much larger than the differences.
            share = x
            if upper is not None:  # What is not free is not at the level.
                largest = jnp.argmax(jnp.where(free, a, 0))
                share = jnp.where(free & (jnp.arange(size) == largest), 1 / a, 0)
            reduced = -(high - a * inner(high, share) + low)
            reduced = reduced - a * inner(reduced, share)
        pull = jnp.where(pulled, ridge, 0)
        reduced = reduced - pull * (x - centre)
        # Free the variable of steepest descent, if this is a minimiser of the face.
        on_face = jnp.max(jnp.abs(reduced), where=free, initial=0)
        noise = eps**1.5 * jnp.max(jnp.abs(Qx) + jnp.abs(q))
        noise = jnp.where(pulled, noise + eps * jnp.max(jnp.abs(x)), noise)
        inwards = 1 if upper is None else jnp.where(x < upper, 1, -1)
        steepest = jnp.where(allowed & ~free, inwards * reduced, 0)
        entering = jnp.argmax(steepest)
        enters = (full_steps > 0) & (steepest[entering] > 4 * on_face + noise)
        entered = enters & (jnp.arange(size) == entering)
        free = free | entered
        # The move to the minimiser over the free variables.
        gap = 1 - dot(a[None], x, x_low, jnp.zeros((1,), Q.dtype))[0]
        move = newton(free, reduced, gap, ridge)
        norm2 = inner(x, Qx)
        # Indefinite by more than was thought.
        indefinite = pulled & (norm2 < -ridge / 2 * inner(x, x))
        failed = ~jnp.all(jnp.isfinite(move)) | indefinite
        ridge = jnp.where(failed, 16 * ridge, ridge)
        move = jnp.where(free & ~failed, move, 0)
        # Between very different scales, its sign may be a rounding error.
        move = jnp.where(entered, inwards * jnp.maximum(inwards * move, 0), move)
        decrement = inner(move, reduced)
        bound, room, length = lower, jnp.maximum(x - lower, 0), -move
        if upper is not None:
            bound = jnp.where(move < 0, lower, upper)
            room, length = jnp.abs(x - bound), jnp.abs(move)
        blocking = free & (room < length)
        ratio = jnp.where(blocking, room / jnp.where(blocking, length, 1), jnp.inf)
        step = jnp.minimum(jnp.min(ratio), 1)
        blocked = blocking & (ratio <= step)
        if upper is not None:  # One at a time, so that some are left to move.
            last = jnp.sum(free) == 1
            blocked = blocked & (jnp.arange(size) == jnp.argmax(blocked)) & ~last
        new, error = two_sum(x, step * move)
        new, new_low = two_sum(new, error + x_low)
        new = jnp.where(blocked, bound, new)
        new_low = jnp.where(blocked, 0, new_low)
        full_steps = jnp.where(jnp.any(blocked), 0, full_steps + 1)
        floor = jnp.where(pulled, eps**2, eps**3)
        big = (16 * eps) ** 2 * norm2 + floor * inner(x, x)
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
    if upper is not None:
        free = free & (first < upper)
    ridge = jnp.asarray(4 * size**0.5 * eps, Q.dtype)
    left = jnp.where(pulled | on_simplex, 4 * size + 20, 8)
    carry = (first, 0 * first, free, ridge, pulled, first, 1, finite & ~settled, left)
    x, *_ = lax.while_loop(lambda c: c[-2] & (c[-1] > 0), body, vary(finite, carry))
    x = jnp.maximum(x, lower)
    x = (x if upper is None else jnp.minimum(x, upper)) * scale
    return jnp.where(finite, x, jnp.nan)
