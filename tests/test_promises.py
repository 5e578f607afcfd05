"""Each promise of the catalog is a test, in float64 so that only methods can fail."""

import pytest

import optax_mtl
from optax_mtl import testing

PROMISED = [
    (promise, name)
    for promise in testing.PROMISES
    for name, row in optax_mtl.METHODS.items()
    if promise in row.promises
]
SCALED = [n for n, row in optax_mtl.METHODS.items() if row.scale != "own"]


@pytest.mark.parametrize("promise, name", PROMISED)
def test_promise(promise, name):
    testing.check_promise(promise, optax_mtl.METHODS[name].make)


@pytest.mark.parametrize("name", SCALED)
def test_native_scale(name):
    testing.check_scale(optax_mtl.METHODS[name].scale, optax_mtl.METHODS[name].make)


def test_every_promise_is_tested_and_made():
    made = set().union(*(row.promises for row in optax_mtl.METHODS.values()))
    assert made == set(testing.PROMISES)
