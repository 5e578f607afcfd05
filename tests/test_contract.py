"""What base.py asks of every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl
from optax_mtl import testing
from tests.common import compiled, every_method, params, stacked


@pytest.mark.parametrize("law", testing.LAWS)
@every_method
def test_law(name, law):
    row = optax_mtl.METHODS[name]
    testing.check_law(law, row.make, reads=row.reads)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, row in optax_mtl.METHODS.items()
        if row.state in ("none", "tasks")
        and (row.reads != {"gradients"} or "agrees" in row.promises)
    ],
)
def test_one_task_keeps_its_direction(name):
    """Unless parameters have step sizes of their own, or some of them none."""
    method, step = compiled(name, 1)
    updates = stacked(1)
    update, state = step(updates, method.init(params()))
    update, _ = step(updates, state)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    update, gradient = flat(update), flat(updates)
    cosine = update @ gradient / np.linalg.norm(update) / np.linalg.norm(gradient)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)


@every_method
def test_says_what_is_not_stacked(name):
    method = optax_mtl.get(name, 3)
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
def test_says_what_else_is_missing(name):
    method = optax_mtl.get(name, 7)  # No parameter has an axis of that size.
    state = method.init(params())
    if any(7 in x.shape for x in jax.tree.leaves(state)):
        with pytest.raises(ValueError, match=r"num_tasks=7.*gradients of 2 tasks"):
            method.update(stacked(2), state, params(), losses=jnp.ones(2))
    if "losses" in optax_mtl.METHODS[name].reads:
        with pytest.raises(TypeError, match="losses=losses"):
            jax.eval_shape(lambda u: method.update(u, state, params()), stacked(7))
        with pytest.raises(ValueError, match=r"losses have shape \(3,\)"):
            method.update(stacked(7), state, losses=jnp.ones(3))
    if "gradients" in optax_mtl.METHODS[name].reads:
        view = optax_mtl.GramView(7, lambda: jnp.eye(7))
        with pytest.raises(TypeError, match="value_and_task_grads"):
            method.update(view, state, losses=jnp.ones(7))
