"""GradDrop at the shared features of a batch, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl

RNG = np.random.default_rng(0)
FEATURES = np.maximum(RNG.normal(size=(5, 7)), 0)  # Of a ReLU.
FEATURES[:, 3] = 0
GRADIENTS = RNG.normal(size=(3, 5, 7))
GRADIENTS[2] *= FEATURES > 0
SUMS = (np.sign(FEATURES) * GRADIENTS).sum(axis=1)  # (3, 7)
PURITY = (1 + SUMS.sum(axis=0) / np.maximum(np.abs(SUMS).sum(axis=0), 1e-30)) / 2
COUNT = 4000


def draws(leak):
    """Updates of many keys, shape (COUNT, 5, 7)."""
    leak = jnp.asarray(leak)

    @jax.jit
    @jax.vmap
    def draw(key):
        method = optax_mtl.graddrop(leak=leak, sum_batch=True, key=key)
        features = jnp.asarray(FEATURES)
        return method.update(jnp.asarray(GRADIENTS), method.init(features), features)[0]

    return np.asarray(draw(jax.random.split(jax.random.key(1), COUNT)))


def of_sign(sign, leak):
    """What is left of all tasks if a feature gets this sign, in all examples."""
    keeps = (SUMS * sign >= 0)[:, None]
    shares = np.reshape(leak, (-1, 1, 1))
    return np.sum((shares + (1 - shares) * keeps) * GRADIENTS, axis=0)


@pytest.mark.parametrize("leak", [[0.0], [0.2, 0, 1]])
def test_one_coin_for_each_feature(leak):
    """Each draw is one of two columns, as often as the paper's purity says."""
    leak = np.broadcast_to(leak, 3)
    found, plus, minus = draws(leak), of_sign(1, leak), of_sign(-1, leak)
    is_plus = np.isclose(found, plus, atol=1e-5).all(axis=1)
    is_minus = np.isclose(found, minus, atol=1e-5).all(axis=1)
    assert (is_plus | is_minus).all()
    differ = np.abs(plus - minus).max(axis=0) > 1e-3
    assert differ.sum() >= 5
    shares = is_plus.mean(axis=0)[differ]
    deviation = np.sqrt(PURITY * (1 - PURITY) / COUNT)[differ]
    assert (np.abs(shares - PURITY[differ]) <= 5 * deviation).all()
    np.testing.assert_array_equal(is_plus[:, 3], True)  # Nothing to choose: kept.


def test_the_mean_is_not_that_of_a_coin_for_each_example():
    expected = PURITY * of_sign(1, np.zeros(3)) + (1 - PURITY) * of_sign(
        -1, np.zeros(3)
    )
    mean = draws(np.zeros(3)).mean(axis=0)
    spread = np.abs(of_sign(1, np.zeros(3)) - of_sign(-1, np.zeros(3)))
    assert (np.abs(mean - expected) <= 5 * spread / np.sqrt(4 * COUNT) + 1e-4).all()
    # A coin for each example and feature would have the mean of the plain sum.
    assert np.abs(mean - GRADIENTS.sum(axis=0)).max() > 1


def test_at_features_and_inside_the_model():
    """The same draw by both ways, and the gradient of the trunk by the chain rule."""
    x, params = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 6))
    heads = RNG.normal(size=(6, 2))
    trunk_fn = lambda params, x: jnp.tanh(x @ params)
    heads_fn = lambda params, z, x: jnp.mean((z @ heads - 1) ** 2, axis=0)
    method = optax_mtl.graddrop(sum_batch=True, key=2)
    resolve = optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, method)

    def loss_fn(params):
        z = optax_mtl.split_tasks(trunk_fn(params, x), 2, method)
        return sum(heads_fn(params, z[i], x)[i] for i in range(2))

    with jax.enable_x64(True):
        _, found, _ = jax.jit(resolve)(params, resolve.init(params, x), x)
        inside = jax.jit(jax.grad(loss_fn))(params)
    np.testing.assert_allclose(inside, found, rtol=1e-9)
    z = np.tanh(x @ params)
    errors = (z @ heads - 1) / 2
    each = np.stack([errors[:, i : i + 1] * heads[:, i] for i in range(2)])
    sums = (np.sign(z) * each).sum(axis=1)
    # Which sign, is in the first column of the trunk's gradient.
    for feature in range(6):
        columns = []
        for sign in (1, -1):
            kept = (each[..., feature] * (sums[:, feature] * sign > 0)[:, None]).sum(0)
            columns.append(x.T @ (kept * (1 - z[:, feature] ** 2)))
        column = np.asarray(found)[:, feature]
        assert any(np.allclose(column, c, rtol=1e-9, atol=1e-12) for c in columns)


def test_what_it_needs():
    method = optax_mtl.graddrop(sum_batch=True)
    with pytest.raises(TypeError, match="reads the features"):
        method.update(jnp.ones((2, 3, 4)), method.init(None))
    with pytest.raises(ValueError, match="leading axis of each parameter"):
        method.update(jnp.ones(2), method.init(None), jnp.ones([]))
