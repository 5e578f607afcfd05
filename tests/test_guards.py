"""Guards skip, leave out or refuse, and change nothing otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros([])}
UPDATES = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3)), jnp.float32),
    "b": jnp.array([1.0, 2.0, -1.0]),
}
BROKEN = {"w": UPDATES["w"].at[1, 0, 0].set(jnp.nan), "b": UPDATES["b"]}
CHAIN = optax.chain(optax_mtl.dwa(3, window=1), optax.adam(1e-2))
LOSSES = jnp.array([1.0, 2.0, 3.0])


def assert_equal(tree, other):
    tree, other = (optax.tree.unwrap_random_key_data(t) for t in (tree, other))
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_finite_steps_are_taken_and_others_skipped():
    tx = optax_mtl.apply_if_finite(CHAIN, max_consecutive_errors=2)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    out, state = update(UPDATES, state, PARAMS, losses=LOSSES)
    plain = jax.jit(CHAIN.update)
    expected, inner = plain(UPDATES, CHAIN.init(PARAMS), PARAMS, losses=LOSSES)
    assert_equal((out, state.inner_state), (expected, inner))
    bad_losses = LOSSES.at[0].set(jnp.inf)
    for updates, losses in ((BROKEN, LOSSES), (UPDATES, bad_losses)):
        out, state = update(updates, state, PARAMS, losses=losses)
        assert_equal((out, state.inner_state), (optax.tree.zeros_like(PARAMS), inner))
    assert (state.notfinite_count, state.total_notfinite) == (2, 2)
    out, state = update(BROKEN, state, PARAMS, losses=LOSSES)  # One too many.
    assert jnp.isnan(out["w"]).any()
    assert update._cache_size() == 1


def test_skipping_with_heads_that_are_not_stacked():
    tx = optax.partition(
        {"trunk": optax_mtl.cagrad(), "head": optax.identity()},
        {"w": "trunk", "b": "head"},
    )
    tx = optax_mtl.apply_if_finite(tx, max_consecutive_errors=2)
    updates = UPDATES | {"b": jnp.array(jnp.nan)}
    out, _ = tx.update(updates, tx.init(PARAMS), PARAMS)
    assert_equal(out, optax.tree.zeros_like(PARAMS))


def test_skipping_counts_as_in_optax():
    """On one task, where the plain wrapper serves as well."""
    one = jax.tree.map(lambda x: x[1:2], BROKEN)
    chain = optax.chain(optax_mtl.mean(), optax.sgd(0.1))
    ours = optax_mtl.apply_if_finite(chain, 3)
    theirs = optax.apply_if_finite(optax.sgd(0.1), 3)
    grads = jax.tree.map(lambda x: x[0], one)
    state, other = ours.init(PARAMS), theirs.init(PARAMS)
    for _ in range(5):
        out, state = ours.update(one, state, PARAMS)
        expected, other = theirs.update(grads, other, PARAMS)
        assert_equal(out, expected)
        assert_equal(state[:3], other[:3])


@pytest.mark.parametrize("name", ["cagrad", "gradvac"])
def test_nonfinite_tasks_are_absent(name):
    method = optax_mtl.get(name, 3)
    guarded = optax.chain(optax_mtl.zero_nonfinite(), method)
    out, state = guarded.update(BROKEN, guarded.init(PARAMS), PARAMS)
    zeroed = jax.tree.map(lambda x: x.at[1].set(0), UPDATES)
    expected, other = method.update(zeroed, method.init(PARAMS), PARAMS)
    assert_equal((out, state[1]), (expected, other))
    untouched, _ = guarded.update(UPDATES, guarded.init(PARAMS), PARAMS)
    assert_equal(untouched, method.update(UPDATES, method.init(PARAMS), PARAMS)[0])


def test_sum_and_mean():
    for method, reduce in (
        (optax_mtl.sum_tasks(), jnp.sum),
        (optax_mtl.mean_tasks(), jnp.mean),
    ):
        out, _ = method.update(UPDATES, method.init(PARAMS), PARAMS)
        expected = jax.tree.map(lambda x, reduce=reduce: reduce(x, axis=0), UPDATES)
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
        jax.tree.map(close, out, expected)


def test_apply_updates_refuses_to_broadcast():
    new = optax_mtl.apply_updates(PARAMS, {"w": jnp.ones((2, 3)), "b": jnp.array(2.0)})
    assert_equal(new, {"w": 2 * jnp.ones((2, 3)), "b": jnp.array(2.0)})
    with pytest.raises(ValueError, match=r"params\['b'\].*begin the chain with a"):
        optax_mtl.apply_updates(PARAMS, UPDATES)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert optax_mtl.apply_updates(low, PARAMS)["w"].dtype == jnp.bfloat16
