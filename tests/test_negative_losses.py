"""Losses that may be negative: a bound makes them positive, or the weights are NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

NEGATIVE = np.array([2.0, -0.5, 1.0])
BOUNDS = np.array([-1.0, -2.0, 0.5])
ABOVE = NEGATIVE - BOUNDS  # 3, 1.5 and 0.5.

# Their own objectives give losses of either sign a meaning.
OF_EITHER_SIGN = ("cosmos", "group_dro", "pbi", "slaw", "v_rex")
# These hold the losses near a ray, with weights of either sign.
NEAR_A_RAY = ("ferero", "pareto_mtl")
CASES = {
    name: (name, {})
    for name, entry in optax_mtl.METHODS.items()
    if "losses" in entry.reads and name not in OF_EITHER_SIGN + NEAR_A_RAY
} | {
    "log_losses": ("log_losses", {}),
    "mgda by loss": ("mgda", {"normalization": "loss"}),
    "mgda by loss and norm": ("mgda", {"normalization": "loss+"}),
    "moco by loss": ("moco", {"normalize": "loss"}),
    "stch with a nadir": ("stch", {"reference": np.full(3, 3.0)}),
    "igb with a reference": ("igb", {"reference": np.array([3.0, 1.0, 2.0])}),
    "gradnorm with first losses": ("gradnorm", {"initial_losses": np.full(3, 3.0)}),
    "db_mtl without averages": ("db_mtl", {"beta": 0.0}),
}


@functools.cache
def compiled(case, bounded=False, shifted=False):
    """State and compiled step, for gradients of 1 of each task in its own parameter."""
    name, options = CASES[case]
    if shifted:
        count = lambda x: x - BOUNDS if isinstance(x, np.ndarray) else x
        options = {key: count(value) for key, value in options.items()}
    if bounded:
        options = options | {"min_losses": BOUNDS}
    if name == "log_losses":
        method = optax.chain(optax_mtl.log_losses(**options), optax_mtl.linear())
    else:
        method = optax_mtl.get(name, 3, **options)
    step = jax.jit(
        lambda state, losses: method.update(jnp.eye(3), state, losses=losses)
    )
    return method.init(jnp.zeros(3)), step


def weights(series, *args, **kwargs):
    """The weights in each step of a series."""
    state, step = compiled(*args, **kwargs)
    seen = []
    for losses in series:
        update, state = step(state, np.float32(losses))
        seen.append(update)
    return np.array(seen)


every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_a_loss_below_its_bound_stops_the_step(case):
    state, step = compiled(case)
    _, state = step(state, np.float32([1, 2, 3]))
    update, after = step(state, np.float32(NEGATIVE))
    assert np.isnan(update).all()
    jax.tree.map(np.testing.assert_array_equal, after, state)


@every_case
def test_losses_count_from_their_bounds(case):
    """As losses shifted by hand do, and with them what they are compared with."""
    series = np.array([NEGATIVE, [1.5, -1, 2], [-0.5, -1.5, 0.75], [3, 3, 3]])
    found = weights(series, case, bounded=True)
    expected = weights(series - BOUNDS, case, shifted=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found >= 0).all() and (found.sum(axis=1) > 0).all()


@every_case
def test_a_loss_at_its_bound_counts_as_absent(case):
    at_bound, absent = ([NEGATIVE, [1.5, x, 2], [1, -1, 1]] for x in (BOUNDS[1], 0))
    found = weights(at_bound, case, bounded=True)
    np.testing.assert_array_equal(found, weights(absent, case, bounded=True))
    # Of the others, one at least has a weight: those of a linear program are few.
    assert found[1, 1] == 0 and (found[1] > 0).any()


SOFTMAX = lambda x: np.exp(x) / np.exp(x).sum()
BY_HAND = {
    "scale_invariant": 1 / ABOVE,
    "log_losses": 1 / ABOVE,
    "gls": np.cbrt(ABOVE.prod()) / (3 * ABOVE),
    "uw_so": SOFTMAX(1 / ABOVE),
    "famo": 1 / ABOVE / np.sum(1 / ABOVE),
    "stch with a nadir": 3 / (3 - BOUNDS) / np.sum(ABOVE / (3 - BOUNDS)),
    "igb with a reference": 3 * SOFTMAX(ABOVE / ([3, 1, 2] - BOUNDS)) / ABOVE,
    # The shortest combination of orthogonal gradients: inverse squared lengths.
    "mgda by loss": ABOVE / np.sum(ABOVE**2),
    "db_mtl without averages": np.full(3, 1 / ABOVE.min()),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_values_by_hand(case):
    found = weights([NEGATIVE], case, bounded=True)[0]
    np.testing.assert_allclose(found, BY_HAND[case], rtol=1e-5)


@pytest.mark.parametrize("name", OF_EITHER_SIGN)
def test_others_follow_their_objective_whatever_the_sign(name):
    """Its numerical gradient, in NumPy."""

    def objective(losses):
        r = np.full(3, 1 / 3)
        if name == "cosmos":
            return r @ losses - r @ losses / np.linalg.norm(r) / np.linalg.norm(losses)
        if name == "v_rex":
            return losses.mean() + losses.var()
        if name == "slaw":  # Without a history.
            return losses.sum()
        if name == "group_dro":  # Its weights are those of a soft maximum.
            return 100 * np.log(np.exp(losses / 100).sum())
        ray = r / np.linalg.norm(r)
        return losses @ ray + 5 * np.linalg.norm(losses - losses @ ray * ray)

    method = optax_mtl.get(name, 3)
    found, _ = method.update(jnp.eye(3), method.init(None), losses=jnp.array(NEGATIVE))
    steps = 1e-6 * np.eye(3)
    slopes = [objective(NEGATIVE + s) - objective(NEGATIVE - s) for s in steps]
    np.testing.assert_allclose(found, np.array(slopes) / 2e-6, rtol=1e-4)


def test_a_wrong_number_of_bounds_is_refused():
    method = optax_mtl.gls(min_losses=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"min_losses has shape \(2,\).* 3 tasks"):
        method.update(jnp.eye(3), method.init(None), losses=jnp.ones(3))


def test_famo_learns_from_losses_above_their_bounds_after_the_step():
    """Those that :func:`famo_update` hands it are counted from the same bounds."""

    def second_weights(method, shift):
        eye, state = jnp.eye(3), method.init(None)
        losses, after = NEGATIVE - shift, NEGATIVE - [0.5, 0.25, -0.5] - shift
        _, state = method.update(eye, state, losses=jnp.array(losses))
        state = optax_mtl.famo_update(state, jnp.array(after))
        return method.update(eye, state, losses=jnp.array(losses))[0]

    options = {"num_tasks": 3, "optimizer": optax.sgd(1.0)}
    found = second_weights(optax_mtl.famo(min_losses=BOUNDS, **options), 0)
    expected = second_weights(optax_mtl.famo(**options), BOUNDS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found - BY_HAND["famo"]).max() > 1e-3
