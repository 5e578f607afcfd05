"""pcgrad(order="losses"): FedFV's projections of vectors, written out in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl import testing

GRADIENTS = np.random.default_rng(3).normal(size=(5, 4))
LOSSES = np.array([0.3, 2.0, -0.5, 1.1, 1.0])


def fair_averaging(gradients, losses, unprojected):
    """The sum of the vectors after the projections."""
    order = np.argsort(losses)
    kept = order[len(losses) - int(np.ceil(unprojected * len(losses))) :]
    total = np.zeros(gradients.shape[1])
    for i, vector in enumerate(gradients.copy()):
        for j in order:
            product = vector @ gradients[j]
            if i != j and i not in kept and product < 0:
                vector -= product / (gradients[j] @ gradients[j]) * gradients[j]
        total += vector
    return total


@functools.cache
def compiled():
    def update(gradients, losses, unprojected):
        method = optax_mtl.pcgrad(order="losses", unprojected=unprojected)
        return method.update(gradients, method.init(None), losses=losses)[0]

    return jax.jit(update)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_against_vectors(double):
    seen = []
    with jax.enable_x64(double):
        for unprojected in (0.0, 0.1, 0.2, 0.4, 0.41, 1.0):
            expected = fair_averaging(GRADIENTS, LOSSES, unprojected)
            found = compiled()(GRADIENTS, LOSSES, unprojected)
            tolerance = 1e-9 if double else 1e-5
            np.testing.assert_allclose(found, expected, rtol=tolerance)
            seen.append(expected)
    np.testing.assert_allclose(seen[-1], GRADIENTS.sum(axis=0))
    # 0.1 and 0.2 of five tasks is one; 0.4 two, 0.41 three.
    same = [np.allclose(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [False, True, False, False, False]


def test_the_order_is_not_that_of_the_tasks():
    plain = optax_mtl.pcgrad(order="losses")
    fixed = optax_mtl.pcgrad(order="fixed")
    order = np.argsort(LOSSES)
    update = lambda method, some: method.update(
        jnp.asarray(GRADIENTS[some]), method.init(None), losses=jnp.array(LOSSES[some])
    )[0]
    found = update(plain, np.arange(5))
    np.testing.assert_allclose(found, update(fixed, order), rtol=1e-5)
    assert np.abs(found - update(fixed, np.arange(5))).max() > 1e-3


def test_absent_tasks_are_no_share():
    """Whatever their losses."""
    present = np.array([0, 1, 4])
    gradients, losses = np.zeros((5, 4)), np.full(5, 9.0)
    gradients[present], losses[present] = GRADIENTS[present], LOSSES[present]
    expected = fair_averaging(GRADIENTS[present], LOSSES[present], 0.3)
    found = compiled()(gradients, losses, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_contract():
    make = lambda num_tasks: optax_mtl.pcgrad(order="losses", unprojected=0.3)
    testing.check_contract(make, reads=("gram", "losses"))
    inject = optax.inject_hyperparams(optax_mtl.pcgrad, static_args=("key", "order"))
    method = inject(order="losses", unprojected=0.4)
    found, _ = method.update(
        jnp.asarray(GRADIENTS), method.init(GRADIENTS[0]), losses=jnp.array(LOSSES)
    )
    expected = fair_averaging(GRADIENTS, LOSSES, 0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_share_needs_the_order():
    with pytest.raises(ValueError, match="take order='losses'"):
        optax_mtl.pcgrad(unprojected=0.1)
