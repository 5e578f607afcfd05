"""Wrappers leave their state and that of the method alone in a step to be skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import optax_mtl

# A method that reads the losses alone cannot know by itself.
BLIND = optax_mtl.dwa(2, window=1)
WRAPPED = {
    "smooth_weights": optax_mtl.smooth_weights(BLIND, 2),
    "update_every": optax_mtl.update_every(BLIND, 1, 2),
    "per_group": optax_mtl.per_group(BLIND, lambda path: "all"),
    "chain": optax.chain(optax_mtl.log_losses(), BLIND),
    "reweigh": optax.chain(optax_mtl.reweigh(BLIND), optax_mtl.linear()),
    "fix_weights": optax_mtl.fix_weights(BLIND, [0.5, None]),
    "record_conflicts": optax_mtl.record_conflicts(2, BLIND),
    "scale_by_agreement": optax_mtl.scale_by_agreement(BLIND),
    "with_sharded_parameters": optax_mtl.with_sharded_parameters(BLIND, "shard"),
}


@functools.cache
def stepper(name):
    """One update; of parameters split over two devices where the wrapper is for it."""
    method = WRAPPED[name]
    update = lambda updates, state, losses: method.update(updates, state, losses=losses)
    if name == "with_sharded_parameters":
        mesh = Mesh(np.array(jax.devices()[:2]), "shard")
        split, whole = PartitionSpec(None, "shard"), PartitionSpec()
        update = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(split, whole, whole),
            out_specs=(PartitionSpec("shard"), whole),
        )
    return jax.jit(update)


@pytest.mark.parametrize("name", WRAPPED)
def test_state_stays_as_it_was(name):
    step = stepper(name)
    good, losses = np.array([[1.0, 0, 2, 1], [0, 1, 1, 3]], np.float32), np.ones(2)
    # Not finite on one of the two devices alone.
    bad = np.where(good == 3, np.nan, good)
    _, state = step(good, WRAPPED[name].init(jnp.zeros(4)), losses)
    for updates, loss in ((bad, 2 * losses), (good, np.array([1, np.nan]))):
        update, after = step(updates, state, loss)
        assert not np.isfinite(update).all()
        jax.tree.map(np.testing.assert_array_equal, after, state)
    _, moved = step(good, state, 2 * losses)  # It would have moved otherwise.
    assert not jax.tree.all(jax.tree.map(np.array_equal, moved, state))


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_state_stays_in_every_mode(mode):
    """The square root has a finite loss at 0, and no finite gradient."""
    losses_fn = lambda w, x: {"a": jnp.sum(w**2), "b": 1 + jnp.sqrt(x * jnp.sum(w))}
    resolve = optax_mtl.value_and_grad(losses_fn, BLIND, mode=mode)
    step, w = jax.jit(resolve), jnp.array([1.0, 2.0])
    _, grads, state = step(w, resolve.init(w), jnp.array(1.0))
    assert np.isfinite(grads).all()
    losses, grads, after = step(w, state, jnp.array(0.0))
    assert np.isfinite(list(losses.values())).all() and not np.isfinite(grads).any()
    jax.tree.map(np.testing.assert_array_equal, after, state)
