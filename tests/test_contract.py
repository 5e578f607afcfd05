"""What base.py asks of every method."""

import chex
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


def make(name, num_tasks):
    return optax_mtl.get(name, num_tasks)


def assert_like_params(update, dtype):
    chex.assert_trees_all_equal_shapes(update, params())
    chex.assert_tree_all_finite(update)
    assert {x.dtype for x in jax.tree.leaves(update)} == {jnp.dtype(dtype)}


def unwrap_keys(state):
    return optax.tree.unwrap_random_key_data(state)


@every_method
def test_shapes_dtypes_and_one_trace(name):
    method, step = compiled(name)
    state = method.init(params())
    assert not any(x.weak_type for x in jax.tree.leaves(unwrap_keys(state)))
    sizes = []
    for seed in range(3):
        update, new_state = step(stacked(3, seed=seed), state)
        sizes.append(step._cache_size())
        assert_like_params(update, "float32")
        chex.assert_tree_all_finite(unwrap_keys(new_state))
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
    assert sizes == sizes[:1] * 3


@every_method
def test_many_tasks_and_low_precision(name):
    method, step = compiled(name, 64)
    dtypes = {"w": "bfloat16", "b": {"c": "float16", "s": "bfloat16"}}
    updates = jax.tree.map(lambda x, d: np.asarray(x, d), stacked(64), dtypes)
    update, state = step(updates, method.init(params()))
    update, state = step(updates, state)
    chex.assert_trees_all_equal_shapes(update, params())
    assert jax.tree.map(lambda x: str(x.dtype), update) == dtypes
    chex.assert_tree_all_finite((update, unwrap_keys(state)))


@every_method
def test_one_task(name):
    method, step = compiled(name, 1)
    updates = stacked(1)
    update, state = step(updates, method.init(params()))
    update, state = step(updates, state)
    assert_like_params(update, "float32")
    chex.assert_tree_all_finite(unwrap_keys(state))
    # It keeps its direction, unless each parameter has a step size of its own.
    if optax_mtl.METHODS[name].state in ("none", "tasks"):
        flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        update, gradient = flat(update), flat(updates)
        cosine = update @ gradient / np.linalg.norm(update) / np.linalg.norm(gradient)
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)


@every_method
def test_scans_under_pmap_like_a_loop(name):
    method, step = compiled(name)
    batches = [stacked(3, seed=seed) for seed in range(3)]
    # A leading axis for the only device, then one for the steps.
    together = jax.tree.map(lambda *x: np.stack(x)[None], *batches)
    state = method.init(params())
    scan = jax.pmap(
        lambda u: jax.lax.scan(lambda s, u: run(method, u, s)[::-1], state, u)[1],
        devices=jax.devices()[:1],
    )
    scanned = scan(together)
    for i, updates in enumerate(batches):
        update, state = step(updates, state)
        this = jax.tree.map(lambda x, i=i: np.asarray(x)[0, i], scanned)
        chex.assert_trees_all_close(this, update, rtol=1e-4, atol=1e-5)


@every_method
def test_is_the_same_without_jit(name):
    method, step = compiled(name)
    updates, state = stacked(3), method.init(params())
    actual, expected = run(method, updates, state)[0], step(updates, state)[0]
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_init_is_abstract_and_can_be_donated(name):
    method = make(name, 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(method.init, params()), method.init(params())
    )
    donate = jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)
    for _ in range(2):  # A second init must not meet a donated buffer.
        donate(method.init(params()))


@every_method
def test_accepts_unknown_extra_arguments(name):
    method = make(name, 2)
    state = method.init(params())
    extra = {"losses": losses(2), "value": 1.0, "unheard_of": None}
    jax.eval_shape(lambda u: method.update(u, state, params(), **extra), stacked(2))


@every_method
def test_absent_task_and_all_zero(name):
    method, step = compiled(name)
    absent = jax.tree.map(
        lambda x: np.asarray(x) * (np.arange(3) != 1).reshape(3, *[1] * (x.ndim - 1)),
        stacked(3),
    )
    zero = jax.tree.map(np.zeros_like, absent)
    for updates in (absent, zero):
        update, state = step(updates, method.init(params()))
        update, state = step(updates, state)
        assert_like_params(update, "float32")
        chex.assert_tree_all_finite(unwrap_keys(state))
    chex.assert_trees_all_equal(update, jax.tree.map(jnp.zeros_like, params()))


@every_method
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scale_of_the_gradients(name, factor):
    method, step = compiled(name)
    state = method.init(params())
    updates = stacked(3)
    update, _ = step(jax.tree.map(lambda x: np.float32(factor) * x, updates), state)
    assert_like_params(update, "float32")
    if "scales" in optax_mtl.METHODS[name].promises:
        expected = jax.tree.map(lambda x: factor * x, step(updates, state)[0])
        chex.assert_trees_all_close(update, expected, rtol=1e-3, atol=1e-4 * factor)


@every_method
def test_non_finite_gradients_pass_and_leave_nothing_behind(name):
    method, step = compiled(name)
    _, state = step(stacked(3), method.init(params()))
    for value in (jnp.nan, jnp.inf):
        bad = stacked(3)
        bad["w"] = bad["w"].at[1, 0, 0].set(value)
        update, after = step(bad, state)
        assert not jnp.all(jnp.isfinite(update["w"]))
        chex.assert_trees_all_equal(unwrap_keys(after), unwrap_keys(state))


@every_method
def test_weights_stand_for_gradients_known_by_their_gram_matrix(name):
    method, step = compiled(name)
    updates, state = stacked(3), method.init(params())

    @compiled_fast
    def weights_of(updates, state):
        view = optax_mtl.GramView(3, lambda: optax_mtl.gram(updates))
        return method.update(view, state, losses=losses(3))[0]

    if "gradients" in optax_mtl.METHODS[name].reads:
        with pytest.raises(TypeError, match="value_and_task_grads"):
            weights_of(updates, state)
        return
    weights = np.asarray(weights_of(updates, state))
    assert weights.shape == (3,)
    expected, _ = step(updates, state)
    actual = jax.tree.map(lambda g: np.tensordot(weights, g, axes=1), updates)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_method
def test_needs_losses_only_if_it_reads_them(name):
    method = make(name, 2)
    call = lambda: jax.eval_shape(
        lambda u: method.update(u, method.init(params()), params())[0], stacked(2)
    )
    if "losses" in optax_mtl.METHODS[name].reads:
        with pytest.raises(TypeError, match="losses=losses"):
            call()
        with pytest.raises(ValueError, match=r"losses have shape \(3,\)"):
            method.update(stacked(2), method.init(params()), losses=jnp.ones(3))
    else:
        call()


@every_method
def test_refuses_what_is_not_stacked(name):
    method = make(name, 3)
    state = method.init(params())

    def update(updates, params=None):
        call = lambda u: method.update(u, state, params, losses=jnp.ones(3))
        jax.eval_shape(call, updates)

    with pytest.raises(ValueError, match=r"leading task axis.*\['b'\]\['s'\] \(\)"):
        update(params())  # The 0-d leaf has none.
    ordinary = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(3, 2\).*\(3, 2\)"):
        update(ordinary, ordinary)
    with pytest.raises(ValueError, match=r"updates\['b'\].*\(2, 5\).*updates\['a'\]"):
        update({"a": jnp.ones((3, 5)), "b": jnp.ones((2, 5))})
    with pytest.raises(ValueError, match=r"no array leaves.*nnx\.State"):
        update({})
    with pytest.raises(TypeError, match=r"updates\['n'\].*int32.*floating-point"):
        update({"n": jnp.ones((3, 2), jnp.int32)})


@every_method
def test_refuses_another_number_of_tasks(name):
    method = make(name, 7)  # No parameter has an axis of that size.
    state = method.init(params())
    if not any(7 in x.shape for x in jax.tree.leaves(state)):
        return  # Without T in its state, a method takes any number of tasks.
    with pytest.raises(ValueError, match=r"num_tasks=7.*gradients of 2 tasks"):
        jax.eval_shape(
            lambda u: method.update(u, state, params(), losses=jnp.ones(2)), stacked(2)
        )


@every_method
def test_passes_an_empty_group_of_a_partition(name):
    labels = {"w": "shared", "b": "shared"}
    chain = optax.partition(
        {"shared": make(name, 2), "heads": make(name, 2)},
        jax.tree.map(lambda k: k, labels),
    )
    state = chain.init(params())
    extra = {"losses": losses(2)}
    update, _ = jax.eval_shape(
        lambda u: chain.update(u, state, params(), **extra), stacked(2)
    )
    chex.assert_trees_all_equal_shapes(update, params())
