"""Under x64, float32 models keep float32 updates and states of the same types."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl import weights
from optax_mtl.methods.baseline import random_weights
from tests.common import losses, params, stacked
from tests.test_debug_flags import EVERY, VARIANTS

ALL = (
    EVERY
    | VARIANTS
    | {
        "multi_steps, one each": lambda: optax_mtl.multi_steps(
            optax_mtl.famo(3), 3, 3, one_task_each=True
        ),
        "lion_lars": lambda: optax.chain(
            optax_mtl.linear(), optax_mtl.scale_by_lion_lars()
        ),
    }
)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ALL)
def test_types_under_x64(name, precision):
    with jax.enable_x64(True):
        method = ALL[name]()
        updates, loss = stacked(3), jnp.asarray(losses(3), precision)
        if "one each" in name:
            updates = jax.tree.map(lambda x: x[0], updates)
        model = jax.tree.map(lambda x: x.astype("float32"), params())

        def scan(state):
            step = lambda s, _: method.update(updates, s, model, losses=loss)[::-1]
            return jax.lax.scan(step, state, length=2)

        init = jax.eval_shape(method.init, model)
        state, out = jax.eval_shape(scan, init)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert types(state) == types(init)
    assert {x.dtype for x in jax.tree.leaves(out)} == {np.dtype("float32")}


def equations(jaxpr):
    """Those of a program and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(inner):
                yield from equations(inner)


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("name", ALL)
def test_a_float64_model_gets_float64_throughout(name):
    """No number on the way is rounded to less, as a count divided by a count is."""
    with jax.enable_x64(True):
        precise = lambda tree: jax.tree.map(lambda x: np.float64(x), tree)
        method, updates, model = ALL[name](), precise(stacked(3)), precise(params())
        if "one each" in name:
            updates = jax.tree.map(lambda x: x[0], updates)
        state = jax.eval_shape(method.init, model)
        update = lambda g, s, p, x: method.update(g, s, p, losses=x)
        program = jax.make_jaxpr(update)(updates, state, model, precise(losses(3)))
    rounded = [
        str(equation.source_info.traceback)
        for equation in equations(program.jaxpr)
        for out in equation.outvars
        if out.aval.dtype in ("float32", "float16", "bfloat16")
    ]
    assert not rounded


@pytest.mark.parametrize("distribution", random_weights.DISTRIBUTIONS)
def test_random_weights_sum_to_one_exactly(distribution):
    with jax.enable_x64(True):
        draw = lambda step: weights.random(jax.random.key(5), step, 3, distribution)
        drawn = np.asarray(jax.vmap(draw)(jnp.arange(64)))
    assert drawn.dtype == np.float64
    np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-14)


def test_whole_numbers_become_float64():
    """Counts of labels, losses, and matrices of the solvers."""
    with jax.enable_x64(True):
        losses_fn = lambda w, x: jnp.stack([(w * x).mean(), (w**2 * x).mean()])
        labels = lambda x: jnp.sum(jnp.stack([x > 0, x > 1]), axis=1)
        fn = optax_mtl.accumulate_task_grads(losses_fn, 3, num_labels=labels)
        _, updates = fn(np.float64(1), np.array([1.0, 2, 1, 2, 0, 1]))
        w = optax_mtl.solvers.simplex_qp(np.array([[18, -22], [-22, 38]]))
        gls, eye = optax_mtl.gls(), jnp.eye(2)
        weights, _ = gls.update(eye, gls.init(None), losses=np.array([1, 3]))
    # Of the examples at 0, 3; 1, 4; 2, 5 with 2, 2, 1 and 1, 1, 0 labels.
    expected = [(2 * 1.5 + 2 * 1 + 1) / 5, 2 * (1.5 + 1) / 2]
    np.testing.assert_allclose(updates, expected, rtol=1e-12)
    np.testing.assert_allclose(w, [0.6, 0.4], rtol=1e-12)
    np.testing.assert_allclose(weights, np.sqrt(3) / [2, 6], rtol=1e-12)
