"""pivrg: against SciPy, and the ways in which scores reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import optax_mtl
from optax_mtl import weights

GRADIENTS = np.random.default_rng(0).normal(size=(4, 9)) + 0.5
SCORES = [12.0, -3.0, 4.5, 0.0]
SOLVE = jax.jit(weights.pivrg)


def expected(scores, bound, min_temperature):
    """Weights of the tasks, and of the gradients by least squares, as the authors do.

    Of the equations times the square root of a, which are smooth at 0.
    """
    gram, scores = GRADIENTS @ GRADIENTS.T, np.array(scores)
    temperature = max(np.ptp(scores) / np.log(bound), min_temperature)
    w = np.exp(scores / temperature)
    w *= len(w) / w.sum()
    equations = lambda root: root * (gram @ root**2) - np.sqrt(w)
    tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    found = scipy.optimize.least_squares(equations, np.full(4, 0.5), **tight)
    assert np.abs(found.fun).max() < 1e-12
    return w, found.x**2


@pytest.mark.parametrize("min_temperature", [0.5, 10.0, 100.0])
def test_against_scipy(min_temperature):
    """By the bound; a bit above it; nearly equal weights."""
    w, a = expected(SCORES, 1.8, min_temperature)
    assert w.max() / w.min() <= 1.8 * (1 + 1e-12)
    gram, scores = GRADIENTS @ GRADIENTS.T, np.array(SCORES)
    for double, tolerance in ((False, 1e-5), (True, 1e-9)):
        with jax.enable_x64(double):
            found = SOLVE(gram, scores, 1.8, min_temperature)
            np.testing.assert_allclose(found, a, rtol=tolerance)
    # With these weights as its preference, it is FairGrad.
    fair = weights.fairgrad(jnp.asarray(gram), jnp.sqrt(jnp.asarray(w)))
    np.testing.assert_allclose(fair, a, rtol=1e-5)


def test_scores_in_every_way_in():
    """At first, injected, as an extra argument through a chain, and by name."""
    _, a = expected(SCORES, 2.0, 10.0)
    by_name = dict(zip("abcd", SCORES))
    losses = dict.fromkeys("abcd", jnp.array(1.0))
    make, updates = optax_mtl.pivrg, jnp.asarray(GRADIENTS, jnp.float32)
    step = lambda method, state, **extra: method.update(updates, state, **extra)[0]
    options = {"max_norm": None}
    found = []
    for method in (make(SCORES, **options), make(by_name, **options)):
        found.append(step(method, method.init(updates[0]), losses=losses))
    chain = optax.chain(make(**options), optax.scale(1.0))
    for scores in (jnp.array(SCORES), by_name):
        found.append(step(chain, chain.init(updates[0]), scores=scores))
    injected = optax.inject_hyperparams(make, static_args="max_norm")
    method = injected(jnp.zeros(4), **options)
    state = method.init(updates[0])
    state.hyperparams["scores"] = jnp.array(SCORES)
    found.append(step(method, state))
    for update in found:
        np.testing.assert_allclose(update, a @ GRADIENTS, rtol=1e-5)
    equal = optax_mtl.fairgrad()
    np.testing.assert_allclose(
        step(make(), make().init(None)), step(equal, equal.init(None)), rtol=1e-6
    )


def test_absent_tasks_leave_the_temperature_alone():
    """Whatever their scores."""
    present = np.array([True, True, False, True])
    updates = jnp.asarray(np.where(present[:, None], GRADIENTS, 0), jnp.float32)
    scores = jnp.where(present, jnp.array(SCORES), 1e6)
    method, some = optax_mtl.pivrg(max_norm=None), np.flatnonzero(present)
    found, _ = method.update(updates, method.init(None), scores=scores)
    wanted, _ = method.update(updates[some], method.init(None), scores=scores[some])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_wrong_number_of_scores_is_refused():
    method, updates = optax_mtl.pivrg(), jnp.eye(3)
    with pytest.raises(ValueError, match=r"scores have shape \(2,\).* 3 tasks"):
        method.update(updates, method.init(None), scores=jnp.ones(2))
    with pytest.raises(ValueError, match=r"scores has shape \(2,\).* 3 tasks"):
        method = optax_mtl.pivrg([1.0, 2.0])
        method.update(updates, method.init(None))
    named = lambda names: dict.fromkeys(names, jnp.array(1.0))
    with pytest.raises(ValueError, match="scores are those of the tasks 'a', 'b', 'd'"):
        method.update(
            updates, method.init(None), losses=named("abc"), scores=named("abd")
        )
