"""How small and how large gradients may be, and what happens beyond."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from tests.common import (
    compiled,
    compiled_fast,
    every_method,
    losses,
    params,
    run,
    stacked,
)

# So many entries of float32 of a square are lost where it is smaller than the smallest
# normal number; all entries of a gradient together have as many as this.
SIZE = sum(x.size for x in jax.tree.leaves(params()))


def scaled(norm, seed=0):
    """Random gradients of three tasks, the longest of the given norm."""
    updates = jax.tree.map(np.asarray, stacked(3, seed=seed))
    squares = sum(np.sum(x.reshape(3, -1) ** 2, axis=1) for x in leaves(updates))
    factor = np.float32(norm / np.sqrt(squares.max()))
    return jax.tree.map(lambda x: factor * x, updates)


def leaves(tree):
    """As NumPy arrays; of random keys their data."""
    return list(
        map(np.asarray, jax.tree.leaves(optax.tree.unwrap_random_key_data(tree)))
    )


def finite(tree):
    return all(np.isfinite(x).all() for x in leaves(tree))


def equal(tree, other):
    return all(map(np.array_equal, leaves(tree), leaves(other)))


@every_method
@pytest.mark.parametrize("norm", [1e-18, 1e-15, 1e15, 1e18])
def test_the_ends_of_the_range(name, norm):
    method, step = compiled(name)
    state, one_state = method.init(params()), method.init(params())
    for seed in range(2):
        update, state = step(scaled(norm, seed), state)
        one, one_state = step(scaled(1, seed), one_state)
        assert finite(update) and finite(state)
        if "scales" not in optax_mtl.METHODS[name].promises:
            continue
        # Products below the smallest normal number, relative to the squared norm.
        lost = SIZE * np.finfo(np.float32).tiny / norm**2
        if lost > 1e-3:
            continue
        errors = [
            x.astype(float) / norm - y for x, y in zip(leaves(update), leaves(one))
        ]
        error = np.sqrt(sum(np.sum(e**2) for e in errors))
        size = np.sqrt(sum(np.sum(y.astype(float) ** 2) for y in leaves(one)))
        assert error <= 1e-4 * size


@every_method
@pytest.mark.parametrize("norm", [1e25, 1e30])
def test_beyond_the_range_nothing_moves(name, norm):
    method, step = compiled(name)
    _, state = step(scaled(1), method.init(params()))
    update, after = step(scaled(norm, seed=1), state)
    assert finite(after)
    if not finite(update):
        assert equal(after, state)


READ_LOSSES = [n for n, row in optax_mtl.METHODS.items() if "losses" in row.reads]


@pytest.mark.parametrize("name", READ_LOSSES)
def test_no_loss_is_too_large_for_a_state(name):
    """Where a state squares losses and that overflows, nothing moves."""
    method = optax_mtl.METHODS[name].make(3)
    step = compiled_fast(lambda u, s, v: method.update(u, s, params(), losses=v))
    _, state = step(scaled(1), method.init(params()), np.float32([1, 2, 3]))
    for size in (1e20, 1e30, 1e38):
        for large in ([1, size, 3], [size, size, size]):
            update, after = step(scaled(1, seed=1), state, np.float32(large))
            assert finite(after)
            if not finite(update):
                assert equal(after, state)


WRAPPED = {
    "adam": lambda: optax_mtl.per_task(optax.scale_by_adam(), 3),
    "adam_without_momentum": lambda: optax_mtl.adatask(3, b1=0.0),
    "ema": lambda: optax_mtl.per_task(optax.ema(0.9), 3),
    "loss_tracking": lambda: optax_mtl.moco(3, normalize="loss"),
    "reweighed": lambda: optax.chain(
        optax_mtl.reweigh(optax_mtl.famo(3)), optax_mtl.mgda()
    ),
    "fixed": lambda: optax_mtl.fix_weights(optax_mtl.modo(3), [None, None, 0.5]),
    "recorded": lambda: optax_mtl.record_conflicts(3, optax_mtl.modo(3)),
    "smooth": lambda: optax_mtl.smooth_weights(optax_mtl.mgda(), 3),
    "every": lambda: optax_mtl.update_every(optax_mtl.mgda(), 2, 3),
    "group": lambda: optax_mtl.per_group(
        optax_mtl.modo(3), {"w": "w", "b": {"c": "b", "s": "b"}}
    ),
    "agreement": lambda: optax_mtl.scale_by_agreement(
        optax.chain(optax_mtl.uncertainty_weighting(3), optax.sgd(0.1))
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_move_nothing_with_an_update_that_is_not_finite(name):
    tx = WRAPPED[name]()
    step = jax.jit(lambda u, s, v: tx.update(u, s, params(), losses=v))
    _, state = step(scaled(1), tx.init(params()), losses(3))
    # One group of parameters only, the losses only, all gradients.
    part = scaled(1)
    part["w"] = np.float32(1e30) * part["w"]
    no_loss = losses(3).at[1].set(jnp.nan)
    for updates, vector in (
        (part, losses(3)),
        (scaled(1, seed=1), no_loss),
        (scaled(1e30), losses(3)),
    ):
        update, after = step(updates, state, vector)
        assert finite(after)
        if not finite(update):
            assert equal(after, state)
    if name not in ("agreement", "every"):  # These measured nothing in the last step.
        assert not finite(update)


def test_a_sum_of_squares_that_grows_too_large():
    """excess_mtl sums squares over the steps: 3e38 is reached in the fifth."""
    method, step = compiled("excess_mtl")
    state, ended = method.init(params()), False
    for _ in range(8):
        update, after = step(scaled(1e19 / 1.2), state)
        assert finite(after)
        ended |= not finite(update)
        assert finite(update) or equal(after, state)
        state = after
    assert ended


def test_m_config_with_a_reversal_at_the_end_of_its_range():
    """The second moment divides differences by 1 - b1, and squares them."""
    method, step = compiled("m_config")
    state = method.init(params())
    for sign in (1, -1, 1):
        updates = jax.tree.map(lambda x, sign=sign: sign * x, scaled(1e19))
        update, after = step(updates, state)
        assert finite(after)
        assert finite(update) or equal(after, state)
        state = after


def test_guards_know_what_cannot_be_squared():
    huge = scaled(1)
    huge = jax.tree.map(lambda x: np.stack([x[0], np.float32(1e30) * x[1], x[2]]), huge)
    rest = jax.tree.map(
        lambda x: x * np.float32([1, 0, 1]).reshape(-1, *[1] * (x.ndim - 1)), huge
    )
    drop = optax_mtl.zero_nonfinite()
    dropped, _ = jax.jit(drop.update)(huge, drop.init(params()), params())
    assert equal(dropped, rest)

    chain = optax.chain(optax_mtl.upgrad(), optax.adam(0.1))
    tx = optax_mtl.apply_if_finite(chain, 1)
    state = tx.init(params())
    step = jax.jit(tx.update)
    update, after = step(huge, state, params())
    assert not any(x.any() for x in leaves(update))
    assert equal(after.inner_state, state.inner_state)
    assert after.total_notfinite == 1 and not after.last_finite
    update, after = step(huge, after, params())  # One was skipped: this one is taken.
    assert not finite(update)
    update, after = step(rest, state, params())
    assert finite(update) and after.last_finite
    assert run(optax_mtl.upgrad(), rest, optax.EmptyState())
