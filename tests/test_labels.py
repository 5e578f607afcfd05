"""Masks and labels by tree, by path and by function of the tree mean the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mtl
from optax_mtl import labels
from tests.common import compiled_fast

PARAMS = {"trunk": {"w": np.ones((2, 3), np.float32)}, "heads": np.ones(2, np.float32)}
SHARED = {"trunk": {"w": True}, "heads": False}


@jax.tree_util.register_pytree_node_class
class Callable:
    """As a module of Equinox: a tree of parameters that can be called."""

    def __init__(self, trunk, heads):
        self.trunk, self.heads = trunk, heads

    def __call__(self, inputs):
        return inputs @ self.trunk

    def tree_flatten(self):
        return (self.trunk, self.heads), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


FORMS = {
    "tree": SHARED,
    "prefix": {"trunk": True, "heads": False},
    "numpy": {"trunk": np.bool_(True), "heads": np.bool_(False)},
    "jax": {"trunk": jnp.array(True), "heads": jnp.array(False)},
    "numbers": {"trunk": 1, "heads": 0},
    "path": lambda path: "trunk" in path,
    "path, not bool": lambda path: np.bool_(path.startswith("trunk/w")),
    "function of the tree": lambda params: {"trunk": True, "heads": False},
    "by shape": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "by key path": lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: "trunk" in jax.tree_util.keystr(path), params
    ),
    "by key": lambda params: {name: name == "trunk" for name in params},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_mask(form):
    assert labels.mask_of(PARAMS, FORMS[form], "shared") == SHARED


def test_forms_reach_every_way():
    """Heads come back as they are, trunk leaves with a task axis, for each argument."""
    losses_fn = lambda p, *_: p["heads"] * p["trunk"]["w"].sum()
    mask = FORMS["path"]
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    expected = {"trunk": {"w": (2, 2, 3)}, "heads": (2,)}
    task_grads = optax_mtl.value_and_task_grads(losses_fn, shared=mask)
    _, updates = task_grads(PARAMS)
    assert shapes(updates) == expected
    accumulate = optax_mtl.accumulate_task_grads(losses_fn, 2, shared=mask)
    assert shapes(jax.eval_shape(accumulate, PARAMS, np.ones(4))[1]) == expected
    chain = optax.partition(
        {"on": optax_mtl.linear(), "off": optax.identity()},
        {"trunk": "on", "heads": "off"},
    )
    tx = optax_mtl.multi_steps(chain, 2, 2, shared=FORMS["jax"])
    assert shapes(tx.init(PARAMS).acc_grads) == expected
    for mode in ("gram", "stacked"):
        resolve = optax_mtl.value_and_grad(
            losses_fn, optax_mtl.gcond(2), mode="stacked", shared=mask
        )
        assert shapes(resolve.init(PARAMS).previous["trunk"]) == {"w": (2, 2, 3)}
        resolve = optax_mtl.value_and_grad(
            losses_fn, optax_mtl.linear(), mode=mode, shared=mask
        )
        _, grads, _ = resolve(PARAMS, resolve.init(PARAMS))
        assert shapes(grads) == shapes(PARAMS)


def test_a_module_that_can_be_called_is_a_mask():
    params = Callable(jnp.ones((2, 2)), jnp.ones(2))
    losses_fn = lambda model: model(jnp.ones((1, 2)))[0] * model.heads
    task_grads = optax_mtl.value_and_task_grads(losses_fn, shared=Callable(True, False))
    _, updates = task_grads(params)
    assert (updates.trunk.shape, updates.heads.shape) == ((2, 2, 2), (2,))
    stacked = Callable(jnp.ones((2, 2, 2)), jnp.ones((2, 2)))
    method = optax_mtl.per_group(optax_mtl.linear(), Callable("a", "b"))
    out, _ = method.update(stacked, method.init(params), params)
    np.testing.assert_array_equal(out.trunk, 2 * params.trunk)
    shards = optax_mtl.with_sharded_parameters(
        optax_mtl.from_gram(jnp.diagonal), "i", sharded=Callable(True, False)
    )
    halves = lambda x: x.reshape(2, 2, 1, 2).swapaxes(0, 1)
    both = Callable(halves(stacked.trunk), jnp.stack([stacked.heads] * 2))
    out = jax.vmap(lambda u: shards.update(u, ())[0], axis_name="i")(both)
    # Two tasks of squared norm 6: 4 over both shards, and 2 that are whole.
    np.testing.assert_array_equal(out.trunk, 12)


def test_groups_by_path_and_by_tree():
    updates = jax.tree.map(lambda p: np.stack([p, 3 * p]), PARAMS)
    names = {"trunk": {"w": "a"}, "heads": "b"}
    for labels_of in (names, lambda path: path, lambda tree: names):
        method = optax_mtl.per_group(optax_mtl.mean(), labels_of)
        out, _ = method.update(updates, method.init(PARAMS), PARAMS)
        jax.tree.map(lambda x, p: np.testing.assert_allclose(x, 2 * p), out, PARAMS)


def test_paths_of_a_flax_model():
    model = nnx.Dict(trunk=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), head=nnx.Param(1.0))
    state = nnx.state(model, nnx.Param)
    mask = labels.mask_of(state, lambda path: path.startswith("trunk/"), "shared")
    assert sorted(jax.tree.leaves(mask)) == [False, True, True]


def test_a_mistake_in_a_function_is_shown():
    with pytest.raises(AttributeError, match="startwith"):
        labels.mask_of(PARAMS, lambda path: path.startwith("trunk"), "shared")


# Methods whose state has the size of the parameters, and what initialised them before.
WITH_STATE = [n for n, row in optax_mtl.METHODS.items() if "P" in row.state]


@pytest.mark.parametrize("name", [*WITH_STATE, "metabalance"])
def test_the_state_of_a_method_with_heads(name):
    """A step in stacked mode, from the state that the function makes."""
    losses_fn = lambda p: p["heads"] * p["trunk"]["w"].sum(axis=0)[:2]
    method = optax_mtl.get(name, 2)
    fn = optax_mtl.value_and_grad(losses_fn, method, mode="stacked", shared=SHARED)
    state = fn.init(PARAMS)
    _, grads, new_state = jax.eval_shape(fn, PARAMS, state)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, PARAMS)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(new_state) == shapes(state)


def test_the_state_at_features():
    trunk_fn = lambda params, x: x @ params["trunk"]["w"]
    heads_fn = lambda params, z, x: params["heads"] * jnp.mean(z**2)
    fn = optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, optax_mtl.gcond(2))
    batch = np.ones((5, 2), np.float32)
    state = fn.init(PARAMS, batch)
    assert state.previous.shape == (2, 5, 3)
    _, grads, _ = compiled_fast(fn)(PARAMS, state, batch)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, PARAMS)
