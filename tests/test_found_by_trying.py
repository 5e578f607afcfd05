"""Faults that trying the library in unforeseen ways has found."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl
from optax_mtl.arguments import check_dtype
from tests.common import every_method, params, stacked


@every_method
def test_a_fresh_state_of_numbers_and_numpy_arrays(name):
    """As that of arrays, without a warning about NumPy's precision."""
    method = optax_mtl.METHODS[name].make(3)
    model = {"a": np.zeros(2, np.float32), "b": jnp.float32(0.5)}
    plain = {"a": np.zeros(2), "b": 0.5}
    types = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert types(method.init(plain)) == types(method.init(model))


@pytest.mark.parametrize(
    "name", ["gcond", "m_config", "sam_gs", "energy_gate", "excess_mtl", "bloop"]
)
def test_a_fresh_state_of_shapes(name):
    """As optax.adam's init takes them."""
    method = optax_mtl.METHODS[name].make(3)
    shapes = jax.eval_shape(params)
    state = method.init(shapes)
    like = jax.eval_shape(method.init, shapes)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, like)
    assert all(not np.any(x) for x in jax.tree.leaves(state) if x.ndim > 1)


def test_one_leaf_beyond_the_range_moves_no_norm():
    """Ratios with an infinite norm are finite: the update hid what the state kept."""
    method = optax_mtl.metabalance(3)
    updates = stacked(3)
    _, state = method.update(updates, method.init(params()), params())
    huge = updates | {"w": updates["w"].at[1].multiply(1e30)}
    update, after = method.update(huge, state, params())
    assert not np.all(np.isfinite(update["w"]))
    same = jax.tree.map(np.array_equal, after, state)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulators_of_complex_parameters_stay_complex(dtype):
    z = jnp.array([1 + 2j, 3 - 1j])
    losses_fn = lambda z, x: {
        "a": jnp.abs(z * x[:, 0].mean()).sum(),
        "b": (z * z).real.sum(),
    }
    x = jnp.ones((2, 1))
    _, expected = optax_mtl.value_and_task_grads(losses_fn)(z, x)
    _, updates = optax_mtl.accumulate_task_grads(losses_fn, 2, dtype=dtype)(z, x)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    tx = optax_mtl.multi_steps(optax_mtl.linear([2, 3]), 1, 2, accumulator_dtype=dtype)
    update, _ = tx.update(updates, tx.init(z), z)
    np.testing.assert_allclose(update, np.array([2, 3]) @ expected, rtol=1e-6)
    gcond = optax_mtl.gcond(2, dtype=dtype)
    assert gcond.init(z).previous.dtype == "complex64"


def test_dtypes_that_hold_no_gradients():
    for dtype in (None, float, "bfloat16", jnp.float16, np.dtype("complex64")):
        check_dtype("dtype", dtype)
    losses_fn = lambda w: {"a": w.sum()}
    for make in (
        lambda: optax_mtl.accumulate_task_grads(losses_fn, 2, dtype=int),
        lambda: optax_mtl.multi_steps(optax_mtl.mgda(), 2, 2, accumulator_dtype=int),
        lambda: optax_mtl.gcond(2, dtype="int32"),
    ):
        with pytest.raises(TypeError, match=r"dtype is .*; it should be floating"):
            make()


def test_one_task_each_with_the_losses_of_all():
    """Named losses failed; of a vector too short the last was taken."""
    chain = optax_mtl.smooth_weights(optax_mtl.dwa(2), 2)
    tx = optax_mtl.multi_steps(chain, 2, 2, one_task_each=True)
    model = jnp.zeros(2)

    def state_after(*losses, **extra_args):
        state = tx.init(model)
        for loss in losses:
            _, state = tx.update(jnp.ones(2), state, model, losses=loss, **extra_args)
        return state.losses, state.counts

    expected = state_after(3.0)
    for both in ({"a": 3.0, "b": 5.0}, jnp.array([3.0, 5.0])):
        for found in (state_after(both), state_after(3.0, num_labels=both)):
            np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(
        state_after(3.0, num_labels={"a": 4, "b": 7})[1], [4, 0]
    )
    with pytest.raises(ValueError, match=r"losses have shape \(1,\)"):
        state_after(jnp.ones(1))
    with pytest.raises(ValueError, match=r"num_labels have shape \(3,\)"):
        state_after(1.0, num_labels=jnp.ones(3))


@pytest.mark.parametrize(
    "function", [lambda p: re.search("w", p), re.compile("w").match]
)
def test_a_function_of_the_path_that_returns_no_bool(function):
    tx = optax_mtl.multi_steps(optax_mtl.mgda(), 2, 2, shared=function)
    with pytest.raises(TypeError) as error:
        tx.init(params())
    assert "None for 'b/c' is no label" in error.value.__notes__[0]


def test_an_infinite_preference():
    with pytest.raises(ValueError, match="one finite number of at least 0"):
        optax_mtl.linear([1, np.inf])


def test_num_labels_is_a_function():
    with pytest.raises(TypeError, match="num_labels is 3; it should be a function"):
        optax_mtl.accumulate_task_grads(lambda w: {"a": w}, 2, num_labels=3)
