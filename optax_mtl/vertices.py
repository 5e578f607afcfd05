"""Linear programs on the simplex: from vertex to vertex, by the simplex method."""

import jax.numpy as jnp
from jax import lax

from optax_mtl.precise import dot, inner, matmul, positive, power_of_two, vary


def best_vertex(c, A, b, allowed):
    """Maximises c'w over the simplex, subject to A w >= b; as solvers.simplex_lp.

    The simplex method in its revised form: each vertex is computed anew from the
    columns that are its basis, with accurate residuals and a corrected inverse, so that
    errors do not add up over the steps. A column that relaxes all constraints alike
    makes the first vertex feasible; it is minimised first, and what is left of it is
    granted.
    """
    rows, size = A.shape
    eps = jnp.finfo(A.dtype).eps
    ones = jnp.ones((1, size), A.dtype)
    left, right = _equilibrate(jnp.where(allowed[None], A, 0))
    left = jnp.append(left, 1 / jnp.max(right))
    # Columns for w in units of `right`, for the slacks, and for the relaxation.
    of_weights = left[:, None] * jnp.concatenate([A, ones]) * right[None]
    identity = jnp.eye(rows + 1, dtype=A.dtype)
    columns = [of_weights, -identity[:, :rows], 1 - identity[:, rows:]]
    M = jnp.concatenate(columns, axis=1)
    relaxation = size + rows
    is_relaxation = (jnp.arange(relaxation + 1) == relaxation).astype(A.dtype)
    may_enter = jnp.concatenate([allowed, jnp.ones(rows, bool), jnp.zeros(1, bool)])
    goal = left * jnp.append(b, 1)
    scaled = c * right
    cost = -scaled / positive(jnp.max(jnp.abs(scaled)))
    cost = jnp.append(cost, jnp.zeros(rows + 1, A.dtype))
    finite = jnp.all(jnp.isfinite(M)) & jnp.all(jnp.isfinite(jnp.append(goal, cost)))

    # The vertex of the simplex that violates the constraints least.
    lacking = jnp.where(allowed[None], left[:rows, None] * (b[:, None] - A), 0)
    lacking = jnp.concatenate([lacking, jnp.zeros((1, size), A.dtype)])
    worst = jnp.where(allowed, jnp.max(lacking, axis=0), jnp.finfo(A.dtype).max)
    first = jnp.argmin(worst)
    basis = jnp.append(size + jnp.arange(rows), first)
    lacks = jnp.arange(rows + 1) == jnp.argmax(lacking[:, first])
    basis = jnp.where(lacks & (worst[first] > 0), relaxation, basis)

    def solve(B, inverse, v):
        refine = lambda _, x: x - matmul(inverse, dot(B, x, 0 * x, -v))
        return lax.fori_loop(0, 3, refine, matmul(inverse, v))

    def body(carry):
        _, basis, inverse, goal, relaxed, stalled, _, steps = carry
        B = M[:, basis]
        inverse = matmul(inverse, 2 * identity - matmul(B, inverse))  # Newton's step.
        x = solve(B, inverse, goal)
        terms_of = lambda x: matmul(jnp.abs(inverse), matmul(jnp.abs(B), jnp.abs(x)))
        slack = 8 * eps * terms_of(x) + eps**3 * jnp.max(jnp.abs(x))
        x = jnp.where(x > slack, x, 0)  # What is left of zeros.
        costs = jnp.where(relaxed, cost, is_relaxation)
        prices = solve(B.T, inverse.T, costs[basis])
        reduced = costs - matmul(prices, M)
        noise = 8 * eps * (jnp.abs(costs) + matmul(jnp.abs(prices), jnp.abs(M)))
        candidate = may_enter.at[basis].set(False)
        gain = jnp.where(candidate & (reduced < -noise), -reduced, 0)
        rest = basis == relaxation
        granted = jnp.sum(jnp.where(rest, x, 0))
        lost = stalled > 2 * (rows + size)  # All that is left are rounding errors.
        improves = jnp.any(gain > 0) & ~lost & (relaxed | (granted > 0))
        # Bland's rule, the first of everything, where the steepest goes in circles.
        careful = stalled > rows
        entering = jnp.where(careful, jnp.argmax(gain > 0), jnp.argmax(gain))
        # No longer needed, the relaxation leaves for whatever divides best.
        expelling = jnp.argmax(jnp.where(candidate, jnp.abs(reduced), 0))
        entering = jnp.where(improves, entering, expelling)
        move = solve(B, inverse, M[:, entering])
        sizes = jnp.abs(move)
        sound = sizes > 8 * eps * terms_of(move)
        blocks = sound & (move > 0)
        ratios = lambda x: jnp.where(blocks, x / jnp.where(blocks, sizes, 1), jnp.inf)
        # Of those that are equal but for rounding errors, the largest divides best.
        near = blocks & (ratios(x) <= jnp.min(ratios(x + slack)))
        near = jnp.where(improves, near, rest & ~relaxed & sound)
        by_order = jnp.argmin(jnp.where(near, basis, len(costs)))
        leaving = jnp.where(careful, by_order, jnp.argmax(jnp.where(near, sizes, 0)))
        pivots = jnp.any(near) & jnp.all(jnp.isfinite(move))
        new = jnp.where(pivots, basis.at[leaving].set(entering), basis)
        row = inverse[leaving] / move[leaving]
        updated = (inverse - move[:, None] * row[None]).at[leaving].set(row)
        inverse = jnp.where(pivots, updated, inverse)
        going = improves & pivots
        terms = inner(jnp.abs(prices), jnp.abs(goal))
        progress = gain[entering] * ratios(x)[leaving] > 8 * eps * terms
        stalled = jnp.where(progress | ~going, 0, stalled + 1)
        done = ~relaxed & ~going
        goal = jnp.where(done, goal - granted * M[:, relaxation], goal)
        relaxed = relaxed | done
        return x, new, inverse, goal, relaxed, stalled, going | done, steps + 1

    inverse = jnp.linalg.inv(M[:, basis])
    carry = vary(finite, (0 * goal, basis, inverse, goal, False, 0, finite, 0))
    going = lambda carry: carry[-2] & (carry[-1] < 20 * (rows + size))
    x, basis, *_ = lax.while_loop(going, body, carry)
    w = jnp.zeros(len(cost), A.dtype).at[basis].add(x)[:size] * right
    w = jnp.where(allowed, w / positive(jnp.sum(w)), 0)
    return jnp.where(finite, w, jnp.nan)


def _equilibrate(matrix):
    """Powers of two for rows and columns, so that the largest entry of each is near 1.

    As Ruiz has it, for whom a few rounds are enough.
    """
    sizes = jnp.abs(matrix)

    def balance(_, scales):
        left, right = scales
        scaled = left[:, None] * sizes * right[None]
        root = lambda axis: power_of_two(jnp.sqrt(positive(jnp.max(scaled, axis=axis))))
        return left / root(1), right / root(0)

    left = 1 / power_of_two(positive(jnp.max(sizes, axis=1)))
    start = left, jnp.ones_like(sizes[0])
    return lax.fori_loop(0, 6, balance, vary(sizes[0, 0] == 0, start))
