"""A task that is never seen changes nothing for the others, whatever is remembered.

Rows without a state are held to the same by the promise ``ignores_absent``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

WITH_STATE = [name for name, row in optax_mtl.METHODS.items() if row.state != "none"]
FACTORIES = {
    name: lambda count, name=name: optax_mtl.get(name, count)
    for name in WITH_STATE
    # Draws a weight for each task, as its docstring says; m_config is below.
    if name not in ("random_weights", "m_config")
} | {
    "dwa, one step": lambda count: optax_mtl.dwa(count, window=1),
    "igb, one step": lambda count: optax_mtl.igb(count, window=1),
    "stch, two steps": lambda count: optax_mtl.stch(count, warmup_steps=1, window=1),
    "gcond, resolved": lambda count: optax_mtl.gcond(count, reference="resolved"),
    "moco by loss": lambda count: optax_mtl.moco(count, normalize="loss"),
    "smooth_weights": lambda count: optax_mtl.smooth_weights(
        optax_mtl.mgda("l2"), count
    ),
    "update_every": lambda count: optax_mtl.update_every(optax_mtl.mgda(), 2, count),
    "agreement": lambda count: optax_mtl.scale_by_agreement(
        optax.chain(optax_mtl.cagrad(), optax.adam(1.0)), measure="cosine"
    ),
}


def updates_of(method, gradients, losses):
    """The updates of all steps."""

    def step(state, inputs):
        update, state = method.update(inputs[0], state, losses=inputs[1])
        return state, update

    run = jax.jit(lambda state, inputs: jax.lax.scan(step, state, inputs)[1])
    return np.array(run(method.init(jnp.zeros(6)), (gradients, losses)))


def series(num_steps=5):
    """Gradients and losses of three tasks, of which the last is never seen."""
    rng = np.random.default_rng(0)
    seen = np.array([1, 1, 0], np.float32)
    gradients = rng.normal(size=(num_steps, 3, 6)).astype(np.float32)
    losses = rng.uniform(0.5, 2, size=(num_steps, 3)).astype(np.float32)
    return seen[:, None] * gradients, seen * losses


@pytest.mark.parametrize("name", FACTORIES)
def test_the_others_get_what_they_would_get_without_it(name):
    gradients, losses = series()
    found = updates_of(FACTORIES[name](3), gradients, losses)
    expected = updates_of(FACTORIES[name](2), gradients[:, :2], losses[:, :2])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found[-1]).max() > 0


def test_m_config_waits_for_one_round_and_no_longer():
    """Gradients that stay the same have averages that do not tell when they began."""
    gradients, losses = (np.tile(x[:1], (6, 1, 1)[: x.ndim]) for x in series())
    found = updates_of(optax_mtl.m_config(3), gradients, losses)
    expected = updates_of(optax_mtl.m_config(2), gradients[:, :2], losses[:, :2])
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)
    # One after the other: after a round of the two that come.
    alone = np.eye(3, dtype=np.float32)[np.arange(6) % 2][:, :, None] * gradients
    found = updates_of(optax_mtl.m_config(3), alone, losses)
    np.testing.assert_array_equal(found[:2], 0)
    assert (np.linalg.norm(found[2:], axis=1) > 1).all()
