"""``optimizer=``: one state for the method and the optimizer, the same in every mode.

Expected values are those of the chain of both, on stacked gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_mtl
import optax_mtl.nnx

T = 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4)).astype(np.float32)
Y = RNG.normal(size=(8, T)).astype(np.float32)
PARAMS = {
    "trunk": RNG.normal(size=(4, 6)).astype(np.float32),
    "heads": RNG.normal(size=(6, T)).astype(np.float32),
}
SHARED = {"trunk": True, "heads": False}
MODES = ["gram", "leafwise", "stacked"]
# Reads the Gram matrix and the losses, has a state and an optimizer of its own.
METHOD, ADAM = optax_mtl.gradnorm(T), optax.adam(1e-2)


def losses_fn(params):
    out = jnp.tanh(X @ params["trunk"]) @ params["heads"]
    return jnp.mean((out - Y) ** 2, axis=0), out.mean()


@functools.cache
def step_of(mode, shared):
    """A compiled step, and the first state."""
    resolve = optax_mtl.value_and_grad(
        losses_fn,
        METHOD,
        has_aux=True,
        mode=mode,
        shared=SHARED if shared else None,
        optimizer=ADAM,
    )

    @jax.jit
    def step(params, state):
        (losses, aux), updates, state = resolve(params, state)
        return optax_mtl.apply_updates(params, updates), state, losses, aux

    return step, resolve.init(PARAMS)


@functools.cache
def step_of_chain(shared):
    """The same on stacked gradients: heads led around the method."""
    routes = {"shared": METHOD, "heads": optax.identity()}
    labels = {"trunk": "shared", "heads": "heads" if shared else "shared"}
    tx = optax.chain(optax.partition(routes, labels) if shared else METHOD, ADAM)
    task_grads = optax_mtl.value_and_task_grads(
        losses_fn, has_aux=True, shared=SHARED if shared else None
    )

    @jax.jit
    def step(params, state):
        (losses, aux), grads = task_grads(params)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state, losses, aux

    return step, tx.init(PARAMS)


def trained(step, state, steps, params=PARAMS):
    for _ in range(steps):
        params, state, losses, aux = step(params, state)
    return params, state, losses, aux


def assert_close(tree, other):
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, tree, other)


@pytest.mark.parametrize("shared", [False, True], ids=["all", "heads"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_chain_on_stacked_gradients(mode, shared):
    expected = trained(*step_of_chain(shared), steps=4)
    found = trained(*step_of(mode, shared), steps=4)
    assert_close((found[0], *found[2:]), (expected[0], *expected[2:]))
    if not shared:
        assert_close(found[1], expected[1])


def test_every_method_has_the_state_of_the_chain():
    """Structure, shapes and types, in every mode; and a step keeps them."""
    type_of = lambda x: (x.shape, x.dtype, x.weak_type)
    params = jax.tree.map(jnp.asarray, PARAMS)
    for name, row in optax_mtl.METHODS.items():
        method = optax_mtl.get(name, T)
        expected = jax.eval_shape(optax.chain(method, ADAM).init, params)
        for mode in MODES:
            fn = optax_mtl.value_and_grad(
                losses_fn, method, True, mode=mode, optimizer=ADAM
            )
            found = jax.eval_shape(fn.init, params)
            assert jax.tree.map(type_of, found) == jax.tree.map(type_of, expected)
            if mode == "stacked" or "gradients" not in row.reads:
                after = jax.eval_shape(fn, params, found)[2]
                assert jax.tree.map(type_of, after) == jax.tree.map(type_of, found)


@pytest.mark.parametrize("shared", [False, True], ids=["all", "heads"])
def test_a_checkpoint_of_a_stacked_run_goes_on_by_the_gram_matrix(tmp_path, shared):
    first, state = step_of("stacked", shared)
    params, state, *_ = trained(first, state, 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        then, target = step_of("gram", shared)
        restored = checkpointer.restore(
            tmp_path / "run",
            {"params": jax.tree.map(jnp.asarray, PARAMS), "state": target},
        )
    found = trained(then, restored["state"], 2, restored["params"])
    assert_close(found, trained(*step_of("stacked", shared), 4))


def test_the_state_of_the_chain_goes_on_by_the_gram_matrix():
    step, state = step_of_chain(False)
    params, state, *_ = trained(step, state, 2)
    found = trained(step_of("gram", False)[0], state, 2, params)
    assert_close(found, trained(step, step_of_chain(False)[1], 4))


def test_at_features():
    trunk_fn = lambda params: jnp.tanh(X @ params["trunk"])
    heads_fn = lambda params, z: jnp.mean((z @ params["heads"] - Y) ** 2, axis=0)
    make = functools.partial(
        optax_mtl.value_and_grad_at_features, trunk_fn, heads_fn, optax_mtl.dwa(T)
    )
    plain, whole = make(), make(optimizer=ADAM)
    state = whole.init(PARAMS)
    losses, updates, (method_state, adam_state) = jax.jit(whole)(PARAMS, state)
    expected, grads, expected_state = jax.jit(plain)(PARAMS, plain.init(PARAMS))
    assert_close((losses, method_state), (expected, expected_state))
    assert_close((updates, adam_state), ADAM.update(grads, ADAM.init(PARAMS), PARAMS))


def test_nnx():
    """Equal to the method, with an ``nnx.Optimizer`` for what follows it."""
    losses_fn = lambda model: jnp.mean((model(X) - Y) ** 2, axis=0)
    make = functools.partial(optax_mtl.nnx.value_and_grad, losses_fn, METHOD)
    new_model = lambda: nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(6, T, rngs=nnx.Rngs(1))
    )
    shared = nnx.PathContains(0)
    resolve, plain = make(shared=shared, optimizer=ADAM), make(shared=shared)
    model, other = new_model(), new_model()
    optimizer = nnx.Optimizer(other, ADAM, wrt=nnx.Param)

    @nnx.jit
    def step(model, state):
        _, updates, state = resolve(model, state)
        params = optax_mtl.apply_updates(nnx.state(model, nnx.Param), updates)
        nnx.update(model, params)
        return state

    @nnx.jit
    def plain_step(model, optimizer, state):
        _, grads, state = plain(model, state)
        optimizer.update(model, grads)
        return state

    state, method_state = resolve.init(model), plain.init(other)
    for _ in range(3):
        state = step(model, state)
        method_state = plain_step(other, optimizer, method_state)
    assert_close(state[0], method_state)
    assert_close(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(other)))


def test_misuse():
    fn = optax_mtl.value_and_grad(losses_fn, METHOD, True, optimizer=ADAM)
    method_state, adam_state = fn.init(PARAMS)
    with pytest.raises(ValueError, match="should be a pair, that of the method and"):
        fn(PARAMS, jnp.zeros(3))
    with pytest.raises(ValueError, match="not the one of this optimizer at these"):
        fn(PARAMS, (method_state, method_state))
    with pytest.raises(ValueError, match="not the one of this method at these"):
        fn(PARAMS, (adam_state, adam_state))
    twice = optax_mtl.value_and_grad(
        losses_fn, METHOD, True, optimizer=optax.chain(METHOD, ADAM)
    )
    with pytest.raises(ValueError, match="expected the gradients of T tasks"):
        jax.eval_shape(lambda: twice(PARAMS, twice.init(PARAMS)))
