"""Arithmetic of the solvers: sums and products that keep their rounding errors."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

matmul = functools.partial(jnp.matmul, precision="highest")


def positive(x):
    """Replaces zeros by ones, for divisions where the numerator is zero, too."""
    return jnp.where(x == 0, 1, x)


def vary(data, carry):
    """Lets a carry vary over the mesh axes of the data, for shard_map."""
    return jax.tree.map(lambda x: jnp.where(data, x, x), carry)


def float_dtype(dtype):
    """The dtype to compute in: float32 at least, and the default for whole numbers."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.result_type(float)
    return jnp.promote_types(dtype, jnp.float32)


def compute(*arrays):
    """Casts to the common dtype, float32 at least."""
    dtype = float_dtype(jnp.result_type(*arrays))
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def two_sum(a, b):
    """Sum of two numbers and its rounding error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def dot(Q, x_high, x_low, start):
    """Computes ``start + Q @ (x_high + x_low)`` without cancellation."""
    return sum(dot_pair(Q, x_high, x_low, start))


def dot_pair(Q, x_high, x_low, start):
    """As ``dot``, as a sum of two numbers, to 3/2 the working precision or more.

    Halves of the numbers have products without rounding errors, which are summed in
    pairs. Where gradients nearly cancel, the working precision is not enough.
    """
    info = jnp.finfo(Q.dtype)
    halve = lambda a: lax.reduce_precision(a, info.nexp, (info.nmant - 1) // 2)
    x_high, x_low = x_high[None], x_low[None]
    Q1, x1 = halve(Q), halve(x_high)
    Q2, x2 = Q - Q1, x_high - x1

    def add(a, b):
        s, error = two_sum(a[0], b[0])
        return s, error + a[1] + b[1]

    zero = jnp.zeros((), Q.dtype)
    pairs = (Q1 * x1, Q1 * x2 + Q2 * x1 + Q2 * x2 + Q * x_low)
    high, low = lax.reduce(pairs, (zero, zero), add, (Q.ndim - 1,))
    high, error = two_sum(high, start)
    return high, low + error


def inner(u, v):
    """Inner product, at full precision on any device."""
    return jnp.sum(u * v)


def power_of_two(x):
    """The power of two next to x > 0: scaling by it is free of rounding errors."""
    _, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.ones_like(x), exponent)
