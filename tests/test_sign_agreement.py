"""Methods that read the signs of the gradients, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl

RNG = np.random.default_rng(0)
GRADIENTS = {"w": RNG.normal(size=(5, 3, 4)) + 0.7, "b": 0.6 * RNG.normal(size=(5, 6))}
both = pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])


def compare(method, by_hand, double):
    """Of a tree of gradients, tensor for tensor."""
    with jax.enable_x64(double):
        step = jax.jit(lambda g: method.update(g, method.init(None))[0])
        found = step(jax.tree.map(jnp.asarray, GRADIENTS))
    tolerance = 1e-9 if double else 1e-5
    for name, x in GRADIENTS.items():
        expected = by_hand(x)
        assert expected.any()
        np.testing.assert_allclose(found[name], expected, tolerance, tolerance)


def smooth(agreement, x, threshold, k):
    return np.maximum(np.tanh(k * (agreement - threshold) / x.var(axis=0, ddof=1)), 0)


@both
@pytest.mark.parametrize("threshold, k", [(0.6, None), (1.0, None), (0.3, 0.2)])
def test_masks(double, threshold, k):
    """Three of five signs, which is 0.2, four, 0.6, or all."""

    def by_hand(x):
        agreement = np.abs(np.sign(x).mean(axis=0))
        mask = agreement >= threshold - 1e-12 if k is None else 0
        mask = smooth(agreement, x, threshold, k) if k else mask
        return mask * x.mean(axis=0) / np.mean(mask)

    make = optax_mtl.and_mask if k is None else optax_mtl.sand_mask
    arguments = (threshold,) if k is None else (threshold, k)
    compare(make(*arguments), by_hand, double)


@both
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(double, density):
    """Of 18 entries 4, 9 or all of each task, over both tensors, by a sort."""
    whole = np.concatenate([GRADIENTS[k].reshape(5, -1) for k in ("b", "w")], axis=1)
    number = int(np.ceil(density * 18))
    level = np.sort(np.abs(whole), axis=1)[:, -number]
    assert (np.abs(whole) >= level[:, None]).sum() == 5 * number

    def by_hand(x):
        kept = np.where(np.abs(x) >= level.reshape(5, *[1] * (x.ndim - 1)), x, 0)
        chosen = np.sign(kept) == np.sign(kept.sum(axis=0))
        return np.sum(chosen * kept, axis=0) / np.maximum(
            np.sum(chosen & (kept != 0), axis=0), 1
        )

    compare(optax_mtl.ties(density), by_hand, double)


def test_ties_keeps_one_entry_at_least():
    """A share of less than 1e-4 entries is rounded up, too."""
    merged, _ = optax_mtl.ties(density=1e-6).update(jnp.array([[1.0, -3, 2]]), ())
    np.testing.assert_array_equal(merged, [0, -3, 0])


def test_what_is_dropped():
    """A share of the entries, another in each step, and the others ten times larger."""
    updates, method = {"a": jnp.ones((2, 50, 40)), "b": jnp.ones((2, 3000))}, None
    method = optax_mtl.dare(drop=0.9, key=3)
    step = jax.jit(method.update)
    first, state = step(updates, method.init(None))
    second, _ = step(updates, state)
    for update in (first, second):
        for x in jax.tree.leaves(update):
            # 0, 10 or 20; their mean within five standard deviations.
            assert np.all(np.isin(np.round(x, 4), [0, 10, 20]))
            assert abs(np.mean(x) - 2) < 5 * np.sqrt(2 * 9 / x.size)
    assert np.mean(first["b"] == second["b"]) < 0.9
    kept, _ = optax_mtl.dare(drop=0.0).update(updates, state)
    np.testing.assert_array_equal(kept["a"], 2)


def test_masks_of_no_agreement_and_of_equal_gradients():
    opposite, equal = jnp.array([[1.0, -2], [-1, 2]]), jnp.array([[3.0, -2]] * 2)
    for method in (optax_mtl.and_mask(), optax_mtl.sand_mask()):
        update = lambda g, method=method: method.update(g, method.init(None))[0]
        np.testing.assert_array_equal(update(opposite), 0)
        np.testing.assert_allclose(update(equal), equal[0])
        np.testing.assert_allclose(update(equal[:1]), equal[0])


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_a_smooth_mask_at_any_size(size):
    """Of small gradients it is that of AND, of large ones in proportion to 1 / var."""
    x = GRADIENTS["w"]
    agreement = np.abs(np.sign(x).mean(axis=0))
    mask = np.maximum(agreement - 0.5, 0) / x.var(axis=0)
    mask = (agreement > 0.5) if size < 1 else mask
    method = optax_mtl.sand_mask()
    found, _ = method.update(jnp.asarray(size * x, jnp.float32), method.init(None))
    expected = mask * x.mean(axis=0) / mask.mean()
    np.testing.assert_allclose(found / size, expected, rtol=1e-5)


def test_counts_by_threshold_are_exact():
    """A share of the signs, at it: in; whatever the number of tasks."""
    cases = [
        (count, opposed)
        for count in (3, 5, 7, 9, 10, 11, 13, 30, 39)
        for opposed in range((count + 1) // 2)
    ]
    signs = np.zeros((len(cases), 39, 1), np.float32)  # The others are absent.
    for case, (count, opposed) in zip(signs, cases):
        case[:count] = 1
        case[:opposed] = -1
    shares = np.array([(count - 2 * opposed) / count for count, opposed in cases])

    def update(signs, share):
        method = optax_mtl.and_mask(share)
        return method.update(signs, method.init(None))[0][0]

    found = jax.jit(jax.vmap(update))(signs, shares.astype(np.float32))
    np.testing.assert_allclose(found, shares, rtol=1e-6)
