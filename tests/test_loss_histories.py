"""Methods that follow the losses over steps, and what they are made of.

Golden values of three steps were computed from the papers' formulae in NumPy; those of
CoV weighting equal the authors' code. The rest is a second derivation, said beside it.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl
from optax_mtl.methods.loss import go4align, softadapt

LOSSES = np.array([[2, 0.5, 1], [1.5, 0.4, 1], [1.2, 0.4, 0.7]])
GOLDEN = {
    "group_dro": ({"step_size": 0.5}, [0.644927, 0.117818, 0.237255]),
    "cov_weighting": ({}, [0.562279, 0.437328, 0.000394]),
    "softadapt": ({}, [0.959619, 1.172081, 0.868299]),
    "relobralo": ({"alpha": 0.9, "rho": 1.0}, [0.986914, 1.012311, 1.000775]),
    "go4align": ({}, [0.867017, 1.916973, 0.867017]),
}


def weights_of(method, losses=LOSSES):
    """Weights in the last of some steps."""

    @jax.jit
    def run(losses):
        eye = jnp.eye(losses.shape[1], dtype=losses.dtype)
        step = lambda state, x: method.update(eye, state, losses=x)[::-1]
        return jax.lax.scan(step, method.init(None), losses)[1][-1]

    return np.asarray(run(jnp.asarray(losses)))


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_golden(name, double):
    options, expected = GOLDEN[name]
    with jax.enable_x64(double):
        found = weights_of(optax_mtl.get(name, 3, **options), LOSSES.astype(float))
    np.testing.assert_allclose(found, expected, atol=1e-6)  # The digits that are given.


def test_random_lookback():
    """At rho = 0 each step looks back to the first: written out in NumPy."""
    softmax = lambda x: 3 * np.exp(x) / np.exp(x).sum()
    last, first = LOSSES[2] / LOSSES[1], LOSSES[2] / LOSSES[0]
    expected = 0.9 * softmax(first) + 0.1 * softmax(last)
    found = weights_of(optax_mtl.relobralo(3, alpha=0.9, rho=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_lookback_comes_as_often_as_it_is_said():
    """Half of 400 steps, within five standard deviations of a binomial."""
    losses = np.tile([[1.0, 2.0]], (400, 1))
    losses[1:, 0] = 0.5  # Since the last step nothing changes.
    method = optax_mtl.relobralo(2, alpha=0.5, rho=0.5, key=1)

    @jax.jit
    def run(losses):
        step = lambda state, x: method.update(jnp.eye(2), state, losses=x)[::-1]
        return jax.lax.scan(step, method.init(None), losses)[1]

    weights = np.asarray(run(jnp.asarray(losses)))[:, 0]
    kept = 0.5 * weights[1:-1] + 0.5  # By the formula, where it does not look back.
    looked_back = np.abs(weights[2:] - kept) > 1e-4
    assert abs(looked_back.sum() - 199) < 50


def test_preference_of_group_dro():
    """Mirror descent written out in NumPy."""
    p = np.array([0.2, 0.3, 0.5])
    q = p * np.exp(0.5 * p * LOSSES.sum(axis=0))
    method = optax_mtl.group_dro(3, step_size=0.5, preference=p.tolist())
    np.testing.assert_allclose(weights_of(method), q / q.sum(), rtol=1e-5)


def test_group_dro_finds_the_worst_mixture():
    """Losses 1 + x and 1 - x / 2 are equal at their minimax, x = 0."""
    method = optax_mtl.group_dro(2, step_size=0.2)

    @jax.jit
    def run(x):
        def step(carry, _):
            x, state = carry
            losses = jnp.stack([1 + x, 1 - x / 2])
            slope, state = method.update(jnp.array([1.0, -0.5]), state, losses=losses)
            return (x - 0.1 * slope, state), x

        return jax.lax.scan(step, (x, method.init(None)), length=2000)[1]

    assert abs(float(run(jnp.float32(0.7))[1000:].mean())) < 0.02


def test_decay_of_cov_weighting():
    """The formulae step by step, in NumPy."""
    mean_l, mean_r, squares = LOSSES[0], np.ones(3), np.zeros(3)
    ratios = LOSSES[1] / mean_l
    new = 0.7 * mean_r + 0.3 * ratios
    squares = squares + (ratios - mean_r) * (ratios - new)
    c = np.sqrt(squares / 2 + 1e-8) / new
    found = weights_of(optax_mtl.cov_weighting(3, decay=0.7))
    np.testing.assert_allclose(found, c / c.sum(), rtol=1e-5)


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_variants_of_softadapt(variant):
    """By the second-order backward difference, 3/2, -2, 1/2."""
    slopes = 1.5 * LOSSES[2] - 2 * LOSSES[1] + 0.5 * LOSSES[0]
    if variant == "normalized":
        slopes = slopes / np.abs(slopes).sum()
    expected = np.exp(0.7 * slopes)
    if variant == "loss_weighted":
        expected = expected * LOSSES.mean(axis=0)
    method = optax_mtl.softadapt(3, variant=variant, beta=0.7, order=2)
    found = weights_of(method)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)


def test_differences_are_exact_for_polynomials():
    rng = np.random.default_rng(0)
    for order in (1, 2, 4, 6):
        polynomial = rng.normal(size=order + 1)
        values = np.polyval(polynomial, -np.arange(order + 1.0))
        with jax.enable_x64(True):
            found = softadapt.difference(jnp.asarray(values)[:, None])
        np.testing.assert_allclose(found[0], polynomial[-2], rtol=1e-10)


def test_groups_have_the_least_squares():
    """Against all ways to cut the sorted values."""
    rng = np.random.default_rng(0)
    values, exists = rng.exponential(size=(20, 6)), rng.random((20, 6)) < 0.8
    for num_groups in (1, 2, 3, 7):
        with jax.enable_x64(True):
            means = jax.jit(
                jax.vmap(lambda v, e, k=num_groups: go4align.mean_of_group(v, e, k))
            )(values, exists)
        for v, e, found in zip(values, exists, np.asarray(means)):
            assert (found[~e] == 0).all()
            squares = ((v - found)[e] ** 2).sum()
            np.testing.assert_allclose(squares, least(v[e], num_groups), atol=1e-12)


def least(values, num_groups):
    values, size = np.sort(values), len(values)
    return min(
        sum(
            ((values[i:j] - values[i:j].mean()) ** 2).sum()
            for i, j in itertools.pairwise((0, *cuts, size))
            if j > i
        )
        for cuts in itertools.combinations_with_replacement(
            range(size + 1), num_groups - 1
        )
    )


def test_one_group_is_the_mean():
    found = weights_of(optax_mtl.go4align(3, num_groups=1, step_size=0.0))
    expected = np.full(3, np.mean(LOSSES[2].sum() / LOSSES[2] / 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def slaw_by_hand(losses, decay):
    """Means of the losses and of their squares, at first plain ones, in NumPy."""
    mean = square = 0
    for n, x in enumerate(losses, start=1):
        kept = min((n - 1) / n, decay)
        mean, square = kept * mean + (1 - kept) * x, kept * square + (1 - kept) * x**2
    inverse = 1 / np.sqrt(square - mean**2)
    return losses.shape[1] * inverse / inverse.sum()


@pytest.mark.parametrize("decay", [0.99, 0.5])
def test_slaw_against_means_of_squares(decay):
    """Also far from zero, where these cancel, and of losses of either sign."""
    series = np.random.default_rng(0).normal(size=(9, 3)) * [1.0, 0.1, 5.0]
    for offset in ([0.0, 0.0, 0.0], [100.0, -20.0, 1.0]):
        losses = series + offset
        method, expected = optax_mtl.slaw(3, decay=decay), slaw_by_hand(losses, decay)
        with jax.enable_x64(True):
            found = weights_of(method, losses)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        # The losses themselves have seven digits.
        found = weights_of(method, losses)
        np.testing.assert_allclose(
            found, expected, rtol=1e-5 if offset[0] == 0 else 2e-4
        )


def test_slaw_is_one_until_deviations_are_known():
    losses = np.array([[2.0, 1.0, 3.0], [1.0, 0.5, 0.0], [1.0, 0.25, 2.0]])
    method = optax_mtl.slaw(3)
    np.testing.assert_array_equal(weights_of(method, losses[:1]), 1)
    # The third is seen for the second time in the third step alone.
    found = weights_of(method, losses[:2])
    np.testing.assert_allclose(found, [2 / 3, 4 / 3, 0], rtol=1e-6)
    assert weights_of(method, losses).min() > 0
    equal = np.ones((3, 2)) * [0.3, 0.7]
    np.testing.assert_array_equal(weights_of(optax_mtl.slaw(2), equal), 1)


def test_slaw_of_a_loss_that_is_constant():
    losses = np.array([[2.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    found = weights_of(optax_mtl.slaw(2), losses)
    np.testing.assert_allclose(found, [2e-5, 2], rtol=2e-5)
