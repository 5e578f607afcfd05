"""ldc_mtl: its objective descended in NumPy, by differences of the objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

LOSSES = np.array([[2, 0.5, 1, 0.7], [1.5, 0.4, 1, 0.9], [1.2, 0.6, 0.7, 0.8]])


def objective(logits, losses, constant, penalty):
    weighted = losses / (1 + np.exp(-logits))
    return weighted.sum() / constant + penalty * np.abs(np.diff(weighted)).sum()


def slopes(fn, x):
    step = 1e-6
    return np.array([fn(x + step * e) - fn(x - step * e) for e in np.eye(len(x))]) / (
        2 * step
    )


def by_hand(losses, penalty, transform, rate):
    """Weights in each step of a descent, without a method."""
    logits, seen = np.ones(losses.shape[1]), []
    shown = (lambda y: np.log(y / losses[0])) if transform == "log" else np.array
    for x in losses:
        constant = np.sum(1 / (1 + np.exp(-logits)))
        # Where all are equal, 0 is the slope of |0|.
        weight = 0 if transform == "log" and not seen else penalty
        value = functools.partial(objective, constant=constant, penalty=weight)
        seen.append(slopes(lambda y, s=logits, f=value: f(s, shown(y)), x))
        step = slopes(functools.partial(value, losses=shown(x)), logits)
        logits = logits - rate * step
    return np.array(seen)


@pytest.mark.parametrize("transform", ["none", "log"])
def test_against_a_descent_in_numpy(transform):
    expected = by_hand(LOSSES, 0.1, transform, 0.5)

    def run(losses):
        method = optax_mtl.ldc_mtl(
            4, penalty=0.1, transform=transform, optimizer=optax.sgd(0.5)
        )
        step = lambda state, x: method.update(jnp.eye(4), state, losses=x)[::-1]
        return jax.lax.scan(step, method.init(None), losses)[1]

    np.testing.assert_allclose(jax.jit(run)(LOSSES), expected, rtol=1e-5)
    with jax.enable_x64(True):
        found = jax.jit(run)(LOSSES)
    # Differences in NumPy have no more digits.
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_golden():
    """At first: 1 / T, and the penalty times w for each neighbour, by their order."""
    method, w = optax_mtl.ldc_mtl(3, penalty=0.1), 1 / (1 + np.exp(-1))
    losses = jnp.array([1.2, 0.4, 0.7])
    found, _ = method.update(jnp.eye(3), method.init(None), losses=losses)
    np.testing.assert_allclose(found, 1 / 3 + 0.1 * w * np.array([1, -2, 1]), rtol=1e-6)


def test_a_penalty_brings_weighted_losses_together():
    """At fixed losses, which are four times each other."""

    @jax.jit
    def ratio(penalty):
        method = optax_mtl.ldc_mtl(3, penalty=penalty, optimizer=optax.adam(0.05))
        losses = jnp.array([2.0, 0.5, 1.0])
        update = lambda state: method.update(jnp.eye(3), state, losses=losses)[1]
        state = jax.lax.fori_loop(0, 100, lambda _, s: update(s), method.init(None))
        weighted = jax.nn.sigmoid(state.logits) * losses
        return weighted.max() / weighted.min()

    assert ratio(0.0) > 3
    assert ratio(1.0) < 1.2
