"""Measures of conflict against NumPy on the gradients, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl

RNG = np.random.default_rng(0)
GRADIENTS = RNG.normal(size=(20, 4, 6)).astype(np.float32)
GRADIENTS[3, 2] = 0
GRADIENTS *= 10 ** RNG.uniform(-2, 2, size=(20, 4, 1)).astype(np.float32)
WEIGHTS = RNG.uniform(0, 2, size=(20, 4)).astype(np.float32)
GRAMS = jax.vmap(optax_mtl.gram)(GRADIENTS)


def directions():
    """Norms and updates in float64, and units where there is a gradient."""
    gradients = GRADIENTS.astype(np.float64)
    norms = np.linalg.norm(gradients, axis=-1)
    update = np.einsum("nt,ntp->np", WEIGHTS, gradients)
    return gradients, norms, update


def test_dominance_is_the_share_of_the_update():
    gradients, _, update = directions()
    parts = WEIGHTS[..., None] * gradients
    expected = np.einsum("ntp,np->nt", parts, update) / (update**2).sum(axis=1)[:, None]
    found = jax.jit(jax.vmap(optax_mtl.dominance))(GRAMS, WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    ones = jax.vmap(optax_mtl.dominance)(GRAMS)
    again = jax.vmap(optax_mtl.dominance)(GRAMS, np.ones((20, 4), np.float32))
    np.testing.assert_array_equal(ones, again)


def test_cosines_of_the_update():
    gradients, norms, update = directions()
    products = np.einsum("ntp,np->nt", gradients, update)
    lengths = norms * np.linalg.norm(update, axis=1)[:, None]
    expected = np.where(norms > 0, products / np.where(norms > 0, lengths, 1), 0)
    found = jax.jit(jax.vmap(optax_mtl.update_cosines))(GRAMS, WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_magnitude_similarity():
    _, norms, _ = directions()
    a, b = norms[:, :, None], norms[:, None]
    there = (a > 0) & (b > 0)
    expected = np.where(there, 2 * a * b / np.where(there, a**2 + b**2, 1), 0)
    found = jax.jit(jax.vmap(optax_mtl.magnitude_similarity))(GRAMS)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_measures_do_not_depend_on_the_unit(scale):
    measure = lambda gram: (
        optax_mtl.dominance(gram),
        optax_mtl.update_cosines(gram),
        optax_mtl.magnitude_similarity(gram),
    )
    found, expected = measure(GRAMS[0] * np.float32(scale) ** 2), measure(GRAMS[0])
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_an_update_that_vanishes_has_no_shares():
    """Three gradients that cancel but for rounding; and none at all."""
    g = RNG.normal(size=(2, 6)).astype(np.float32)
    cancel = optax_mtl.gram(jnp.array([*g, -g.sum(axis=0)]))
    for gram in (cancel, jnp.zeros((3, 3))):
        np.testing.assert_array_equal(optax_mtl.dominance(gram), 0)
        np.testing.assert_array_equal(optax_mtl.update_cosines(gram), 0)


def test_conflicts_by_group():
    updates = {
        "block": {"w": GRADIENTS[0], "b": GRADIENTS[1]},
        "last": GRADIENTS[2],
    }
    by_leaf = optax_mtl.conflicts_by_group(updates)
    assert list(by_leaf) == ["block/b", "block/w", "last"]
    labels = lambda path: path.split("/")[0]
    names = ["a", "b", "c", "d"]
    found = jax.jit(lambda x: optax_mtl.conflicts_by_group(x, labels, names))(updates)
    assert list(found) == ["block", "last"] and found["last"].names == tuple(names)
    joined = np.concatenate(GRADIENTS[:2], axis=1)
    for group, gradients in (("block", joined), ("last", GRADIENTS[2])):
        expected = optax_mtl.conflicts(optax_mtl.gram(jnp.asarray(gradients)))
        np.testing.assert_allclose(
            found[group].cosines, expected.cosines, rtol=1e-4, atol=1e-6
        )


def test_gradients_in_the_place_of_their_gram_matrix():
    for name in ("dominance", "update_cosines", "magnitude_similarity"):
        with pytest.raises(TypeError, match=rf"{name} takes a Gram matrix"):
            getattr(optax_mtl, name)(GRADIENTS[0])
    view = optax_mtl.GramView(4, lambda: GRAMS[0])
    with pytest.raises(TypeError, match="conflicts_by_group reads the task gradients"):
        optax_mtl.conflicts_by_group(view)


def test_weights_of_an_update():
    """A list is as good as an array; another number of them, or a dict, is refused."""
    for measure in (optax_mtl.dominance, optax_mtl.update_cosines):
        weights = [1.0, 2.0, 0.5, 0.0]
        found = measure(GRAMS[0], weights)
        np.testing.assert_array_equal(found, measure(GRAMS[0], jnp.array(weights)))
        for wrong in ([1.0, 2.0], dict(zip("abcd", weights)), 1.0):
            with pytest.raises(ValueError, match=r"one for each task, shape \(4,\)"):
                measure(GRAMS[0], wrong)
