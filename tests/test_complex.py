"""Complex parameters are pairs of real ones, in every method and every way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from tests.common import compiled_fast, losses

T = 3
RNG = np.random.default_rng(0)
SHAPES = {"w": (3, 2), "s": (), "r": (4,)}
READ_GRADIENTS = [n for n, r in optax_mtl.METHODS.items() if "gradients" in r.reads]


def draw(*lead):
    """Complex leaves and one that is real."""

    def leaf(name, shape):
        x = RNG.normal(size=(2, *lead, *shape)).astype(np.float32)
        return x[0] if name == "r" else x[0] + 1j * x[1]

    return {name: jnp.asarray(leaf(name, shape)) for name, shape in SHAPES.items()}


def pairs(tree):
    """Real and imaginary parts of complex leaves, along a last axis."""
    stack = lambda z: jnp.stack([z.real, z.imag], axis=-1)
    return jax.tree.map(lambda z: stack(z) if jnp.iscomplexobj(z) else z, tree)


def assert_close(tree, other, tolerance=1e-4):
    difference = optax.tree.norm(optax.tree.sub(tree, other))
    assert difference <= tolerance * optax.tree.norm(other)


@pytest.mark.parametrize("name", [*READ_GRADIENTS, "inverse_norm", "gls"])
def test_complex_gradients_stand_for_pairs_of_real_ones(name):
    """Those that read the Gram matrix see it as :func:`gram` makes it."""
    method = optax_mtl.get(name, T)

    @compiled_fast
    def two_steps(params, *steps):
        state = method.init(params)
        for updates in steps:
            out, state = method.update(updates, state, params, losses=losses(T))
        return out

    params, *steps = draw(), draw(T), draw(T)
    out = two_steps(params, *steps)
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(
        lambda x: x.dtype, params
    )
    assert_close(pairs(out), two_steps(*pairs([params, *steps])))


TARGETS = draw(T)


def losses_fn(params):
    """Not holomorphic, and each of all leaves."""
    errors = jax.tree.map(
        lambda p, t: jnp.abs(p[None] * (1 + p[None]) - t) ** 2, params, TARGETS
    )
    return sum(e.reshape(T, -1).sum(axis=1) for e in jax.tree.leaves(errors))


def pair_losses_fn(params):
    to_complex = lambda like, x: (
        jax.lax.complex(x[..., 0], x[..., 1]) if jnp.iscomplexobj(like) else x
    )
    return losses_fn(jax.tree.map(to_complex, PARAMS, params))


PARAMS = draw()
BY_GRAM = [
    n
    for n, row in optax_mtl.METHODS.items()
    if "gram" in row.reads and "gradients" not in row.reads
]


@pytest.fixture(scope="module")
def gram():
    """Inner products of the gradients with respect to the pairs, by NumPy."""
    jacobian = jax.jacrev(pair_losses_fn)(pairs(PARAMS))
    rows = [np.asarray(x, np.float64).reshape(T, -1) for x in jax.tree.leaves(jacobian)]
    rows = np.concatenate(rows, axis=1)
    return rows @ rows.T


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_the_gram_matrix_of_complex_parameters(gram, mode):
    """Hence every method that reads it gets the same in each mode."""
    show = optax_mtl.from_state(
        lambda: jnp.zeros((T, T)),
        lambda state, gram: (jnp.arange(1.0, T + 1), gram),
        reads=["gram"],
    )
    fn = optax_mtl.value_and_grad(losses_fn, show, mode=mode)
    _, grads, measured = compiled_fast(fn)(PARAMS, fn.init(PARAMS))
    np.testing.assert_allclose(measured, gram, rtol=1e-4)
    weighted = jax.grad(lambda p: jnp.arange(1.0, T + 1) @ losses_fn(p))(PARAMS)
    assert_close(grads, weighted)


def test_a_gradient_of_six_minus_eight_i_has_the_square_100():
    norm = lambda z: jnp.stack([(z * z.conj()).real.sum()])
    show = optax_mtl.from_state(
        lambda: jnp.zeros((1, 1)), lambda _, gram: (jnp.ones(1), gram), reads=["gram"]
    )
    fn = optax_mtl.value_and_grad(norm, show)
    z = jnp.array([3 + 4j])
    assert fn(z, fn.init(z))[2] == 100


@pytest.mark.parametrize("name", BY_GRAM)
def test_methods_by_gram_agree_between_modes(name):
    method = optax_mtl.get(name, T)
    by_gram, stacked = (
        optax_mtl.value_and_grad(losses_fn, method, mode=mode)
        for mode in ("gram", "stacked")
    )

    @compiled_fast
    def both(params):
        state = method.init(params)
        return by_gram(params, state)[1], stacked(params, state)[1]

    found, expected = both(PARAMS)
    assert_close(found, expected, 1e-3)


def test_other_ways_with_complex_parameters(gram):
    """The features carry the parameters, and the micro-batches are all the same."""
    del gram
    at_features = optax_mtl.value_and_grad_at_features(
        lambda params: params, lambda _, features: losses_fn(features), optax_mtl.mgda()
    )
    by_gram = optax_mtl.value_and_grad(losses_fn, optax_mtl.mgda())
    _, found, _ = compiled_fast(at_features)(PARAMS, at_features.init(PARAMS))
    _, expected, _ = compiled_fast(by_gram)(PARAMS, by_gram.init(PARAMS))
    assert_close(found, expected, 1e-3)
    task_grads = optax_mtl.value_and_task_grads(losses_fn)(PARAMS)[1]
    accumulate = optax_mtl.accumulate_task_grads(lambda p, x: losses_fn(p), 2)
    assert_close(accumulate(PARAMS, jnp.ones(4))[1], task_grads)
    chain = optax.chain(optax_mtl.linear(), optax.sgd(1.0))
    tx = optax_mtl.multi_steps(chain, 1, T)
    out, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(out, jax.tree.map(lambda g: -g.sum(axis=0), task_grads))


def test_complex_losses_are_refused():
    complex_losses = lambda p: {"a": (p["w"] ** 2).sum(), "b": p["r"].sum()}
    method = optax_mtl.mean()
    for fn in (
        optax_mtl.value_and_task_grads(complex_losses),
        lambda p: optax_mtl.value_and_grad(complex_losses, method)(p, ()),
        lambda p: optax_mtl.accumulate_task_grads(complex_losses, 1)(p),
        lambda p: optax_mtl.gls().update(draw(2), (), p, losses=complex_losses(p)),
    ):
        with pytest.raises(TypeError, match=r"complex64.*real part"):
            jax.eval_shape(fn, PARAMS)
