"""The ``TrainState`` that hands losses on: equal to the plain loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

import optax_mtl
from optax_mtl.linen import TrainState

T = 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4)).astype(np.float32)
Y = RNG.normal(size=(8, T)).astype(np.float32)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))
        return nn.Dense(T)(nn.tanh(x))


class StateWithStatistics(TrainState):
    batch_stats: Any = None


MODEL = Model()


def losses_fn(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    out, new = MODEL.apply(variables, X, mutable=["batch_stats"])
    return jnp.mean((out - Y) ** 2, axis=0), new["batch_stats"]


task_grads = optax_mtl.value_and_task_grads(losses_fn, has_aux=True)


def create(seed=0):
    """With a method that reads losses and keeps a state."""
    variables = MODEL.init(jax.random.key(seed), X)
    tx = optax.chain(optax_mtl.dwa(T), optax.adamw(1e-2))
    return StateWithStatistics.create(
        apply_fn=MODEL.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
    )


def step(state):
    (losses, batch_stats), grads = task_grads(state.params, state.batch_stats)
    return state.apply_gradients(grads=grads, losses=losses, batch_stats=batch_stats)


def assert_close(tree, other):
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, tree, other)


def test_equals_the_plain_loop_and_takes_donated_states():
    state = create()
    params, batch_stats, opt_state = state.params, state.batch_stats, state.opt_state

    @jax.jit
    def plain_step(params, batch_stats, opt_state):
        (losses, batch_stats), grads = task_grads(params, batch_stats)
        updates, opt_state = state.tx.update(grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    donated = jax.jit(step, donate_argnums=0)
    kept = jax.tree.map(jnp.copy, state)
    for _ in range(3):
        params, batch_stats, opt_state = plain_step(params, batch_stats, opt_state)
        last, kept = kept, donated(kept)
        assert all(x.is_deleted() for x in jax.tree.leaves(last.params))
        assert all(x.is_deleted() for x in jax.tree.leaves(last.opt_state))
    assert kept.step == 3 and kept.tx is state.tx
    assert_close((kept.params, kept.batch_stats), (params, batch_stats))
    assert_close(kept.opt_state, opt_state)
    assert (kept.opt_state[0].seen == 3).all()
    scanned, _ = jax.lax.scan(lambda s, _: (step(s), None), create(), length=3)
    assert_close(scanned.params, params)


def test_passes_through_orbax(tmp_path):
    train_step = jax.jit(step)
    state = train_step(train_step(create()))
    other = create(seed=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", other)
    same = lambda x, y: np.testing.assert_array_equal(x, y)
    jax.tree.map(
        same, (restored.params, restored.opt_state), (state.params, state.opt_state)
    )
    assert restored.step == 2
    assert_close(train_step(restored).params, train_step(state).params)


def test_misuse():
    state = create()
    grads = jax.tree.map(lambda p: jnp.zeros((T, *p.shape)), state.params)
    with pytest.raises(TypeError, match=r"state.apply_gradients\(grads=grads, losses="):
        state.apply_gradients(grads=grads)
    with pytest.raises(TypeError, match="batch_statistics"):
        state.apply_gradients(grads=grads, losses=jnp.ones(T), batch_statistics={})
    forgotten = state.replace(tx=optax.sgd(0.1), opt_state=optax.sgd(0.1).init(None))
    with pytest.raises(ValueError, match=r"has shape \(3, 6\), the parameter \(6,\)"):
        forgotten.apply_gradients(grads=grads)


def test_is_checked():
    state = create()
    optax_mtl.check(state, state.params, T)
    with pytest.raises(TypeError, match="this method reads the losses"):
        optax_mtl.check(state, state.params, T, losses=None)
