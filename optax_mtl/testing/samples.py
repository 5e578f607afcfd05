"""Gradients to try a method on: of a small tree, and matrices of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# For where compiling takes the time: without optimizing.
compiled_fast = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def params():
    """Parameters with a 0-d leaf and nesting."""
    return {"w": jnp.ones((3, 2)), "b": {"c": jnp.zeros(4), "s": jnp.array(0.5)}}


def stacked(num_tasks, dtype=jnp.float32, seed=0):
    """Random stacked gradients of :func:`params`."""
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.normal(size=(num_tasks, *p.shape)), dtype)
    return jax.tree.map(draw, params())


def losses(num_tasks):
    return jnp.linspace(0.5, 2.0, num_tasks)


# Matrices of gradients by their stationarity; constructions of Quinton and Rey,
# "Jacobian Descent for Multi-Objective Optimization", 2024, as in TorchJD's tests.


def _orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def _complement(vectors):
    """Orthonormal basis of the complement of some vectors, as columns."""
    u, s, _ = np.linalg.svd(vectors, full_matrices=True)
    return u[:, np.sum(s > 1e-12) :]


def _with_left_vectors(rng, u, num_params):
    """A matrix with given left singular vectors and random positive values."""
    rank = u.shape[1]
    v = _orthonormal(rng, num_params, rank)
    return u @ np.diag(rng.uniform(0.5, 2, rank)) @ v.T


def normal(rng, num_tasks, num_params, rank):
    u = _orthonormal(rng, num_tasks, rank)
    return _with_left_vectors(rng, u, num_params)


def strongly_stationary(rng, num_tasks, num_params, rank):
    """There are positive weights whose combination of the rows is zero."""
    v = np.abs(rng.normal(size=(num_tasks, 1))) + 0.1
    return _with_left_vectors(rng, _complement(v)[:, :rank], num_params)


def weakly_stationary(rng, num_tasks, num_params, rank):
    """There are weights of at least 0 that do so, but no positive ones."""
    u = np.abs(rng.normal(size=num_tasks)) + 0.1
    first = np.arange(num_tasks) < rng.integers(1, num_tasks)
    rng.shuffle(first)
    v, rest = (np.where(m, u, 0)[:, None] for m in (first, ~first))
    rest /= np.linalg.norm(rest)
    basis = np.hstack([rest, _complement(np.hstack([v, rest]))])[:, :rank]
    return _with_left_vectors(rng, basis, num_params)


def badly_scaled(rng, num_tasks, num_params, rank):
    scales = np.exp(1.5 * rng.normal(size=(num_tasks, 1)))
    return scales * normal(rng, num_tasks, num_params, rank)


def equal(rng, num_tasks, num_params):
    return np.tile(rng.normal(size=num_params), (num_tasks, 1))


def antiparallel(rng, num_tasks, num_params):
    signs = np.where(np.arange(num_tasks) % 2, -1, 1) * np.arange(1, num_tasks + 1)
    return signs[:, None] * rng.normal(size=num_params)


NUM_TASKS, NUM_PARAMS = 4, 6


@functools.cache
def matrices(kind):
    """A batch of gradient matrices of one kind, shape (8, 4, 6)."""
    rng = np.random.default_rng(0)
    shape = (NUM_TASKS, NUM_PARAMS)
    if kind == "any":
        samples = [
            normal(rng, *shape, 4),
            normal(rng, *shape, 4),
            normal(rng, *shape, 2),
            badly_scaled(rng, *shape, 4),
            strongly_stationary(rng, *shape, 3),
            weakly_stationary(rng, *shape, 3),
            equal(rng, *shape),
            antiparallel(rng, *shape),
        ]
    elif kind == "strong":
        ranks = [3, 3, 3, 2, 2, 2, 1, 1]
        samples = [strongly_stationary(rng, *shape, rank) for rank in ranks]
    elif kind == "regular":
        samples = [normal(rng, *shape, 4) for _ in range(4)]
        samples += [badly_scaled(rng, *shape, 4) for _ in range(4)]
    return np.stack(samples)
