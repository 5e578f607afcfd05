"""Weights that are computed in some steps only: what the others cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl
from optax_mtl import value_and_grad
from tests.common import flops

T, N, D, EVERY = 3, 4, 5, 3
PARAMS = {"trunk": np.ones((D, D), np.float32), "last": np.eye(D, dtype=np.float32)}
X = np.ones((N, D), np.float32)
TASKS = np.arange(T)
PASSES = []


def note(gradient):
    PASSES.append(gradient.size // (N * D))
    return gradient


@jax.custom_vjp
def watched(z):
    """The same; each backward pass is noted where it runs."""
    return z


def note_pass(_, gradient):
    like = jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
    return (jax.pure_callback(note, like, gradient, vmap_method="expand_dims"),)


watched.defvjp(lambda z: (z, None), note_pass)


def head_fn(params, x):
    return jnp.tanh(watched(x @ params["trunk"])) @ params["last"]


def vector_fn(params, x):
    return jnp.mean((head_fn(params, x)[:, :T] - TASKS[None]) ** 2, axis=0)


def dict_fn(params, x):
    return dict(zip("abc", vector_fn(params, x)))


def of_one(params, task, x):
    return jnp.mean((head_fn(params, x)[:, 0] - task) ** 2)


CASES = {
    "vector": (vector_fn, {}, (X,), T + 1),
    "dict": (dict_fn, {}, (X,), T + 1),
    "own data": (of_one, {"own_data": True}, (TASKS, np.stack([X] * T)), 2 * T),
    # Its passes do not come down to what is watched.
    "measured above": (dict_fn, {"measure": lambda path: path == "last"}, (X,), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_backward_passes_of_each_step(case):
    losses_fn, options, args, when_measured = CASES[case]
    method = optax_mtl.update_every(optax_mtl.upgrad(), EVERY, T)
    fn = value_and_grad(losses_fn, method, mode="leafwise", **options)
    step = jax.jit(lambda params, state, *args: fn(params, state, *args)[1:])
    between = T if "own_data" in options else 1  # One, of the data of all tasks.
    state, found = fn.init(PARAMS), []
    for _ in range(EVERY + 1):
        PASSES.clear()
        _, state = jax.block_until_ready(step(PARAMS, state, *args))
        found.append(sum(PASSES))
    assert found == [when_measured, between, between, when_measured]


@pytest.mark.parametrize("mode", ["gram", "leafwise"])
def test_a_step_between_costs_the_plain_sum(mode):
    """Counted by the compiler, told that this is the second step."""
    size, count = 128, 4
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {"layers": [shape(size, size)] * 4, "heads": shape(size, count)}

    def losses_fn(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ params["heads"]) ** 2, axis=0)

    method = optax_mtl.update_every(optax_mtl.upgrad(), 10, count)
    fn = value_and_grad(losses_fn, method, mode=mode)
    state = fn.init(jax.tree.map(lambda x: jnp.zeros(x.shape), params))

    def cost(steps):
        known = state._replace(steps=jnp.int32(steps))
        return flops(lambda params, x: fn(params, known, x), params, shape(64, size))

    plain = flops(
        jax.value_and_grad(lambda params, x: losses_fn(params, x).sum()),
        params,
        shape(64, size),
    )
    assert cost(1) <= 1.05 * plain
    assert cost(10) >= 2 * plain
