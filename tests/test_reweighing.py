"""One method's weights in front of another, fixed weights beside, losses in groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

RNG = np.random.default_rng(0)
STEPS, T, SIZE = 3, 3, 5
GRADIENTS = RNG.normal(size=(STEPS, T, SIZE)).astype(np.float32)
LOSSES = RNG.uniform(0.5, 2, size=(STEPS, T)).astype(np.float32)


def all_steps(method, view=False):
    """Updates and state after each step, of stacked gradients or of their products."""

    def step(state, batch):
        gradients, losses = batch
        if view:
            gradients = optax_mtl.GramView(
                T, lambda: batch[0] @ batch[0].T, lambda weights: weights @ batch[0]
            )
        update, state = method.update(gradients, state, losses=losses)
        return state, (update, state)

    return lambda gradients, losses: jax.lax.scan(
        step, method.init(jnp.zeros(SIZE)), (gradients, losses)
    )[1]


def compare(found, expected, rtol=1e-5):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5)
    plain = optax.tree.unwrap_random_key_data
    jax.tree.map(close, plain(found), plain(expected))


READ_LOSSES = [n for n, row in optax_mtl.METHODS.items() if row.reads == {"losses"}]


def test_reweigh_in_front_of_the_sum_is_the_method():
    """Of all that read losses, updates and states; in both kinds of gradients."""
    methods = {name: optax_mtl.get(name, T) for name in READ_LOSSES}
    chains = {
        name: optax.chain(optax_mtl.reweigh(method), optax_mtl.linear())
        for name, method in methods.items()
    }
    run = lambda methods, **kwargs: {
        name: all_steps(method, **kwargs)(GRADIENTS, LOSSES)
        for name, method in methods.items()
    }
    expected, stacked, products = jax.jit(
        lambda: (run(methods), run(chains), run(chains, view=True))
    )()
    for name, (updates, states) in expected.items():
        for found in (stacked, products):
            compare(found[name][0], updates)
            compare(found[name][1][0], states)


def test_reweigh_in_front_of_a_method_is_the_method_of_weighted_losses():
    """Weights 1 / L in front of MGDA, against gradients that NumPy divides."""
    chain = optax.chain(
        optax_mtl.reweigh(optax_mtl.scale_invariant()), optax_mtl.mgda()
    )
    found = jax.jit(all_steps(chain))(GRADIENTS, LOSSES)[0]
    divided = GRADIENTS / LOSSES[..., None]
    compare(found, jax.jit(all_steps(optax_mtl.mgda()))(divided, LOSSES)[0])


def test_reweigh_measures_what_it_has_to_and_once():
    """Not at all without a state; and the weights of inner products are as good."""

    def refuse():
        raise AssertionError("the Gram matrix is not needed")

    view = optax_mtl.GramView(T, refuse)
    chain = optax.chain(optax_mtl.reweigh(optax_mtl.gls()), optax_mtl.linear())
    weights, _ = chain.update(view, chain.init(None), losses=LOSSES[0])
    product = np.prod(LOSSES[0]) ** (1 / T)
    np.testing.assert_allclose(weights, product / (T * LOSSES[0]), rtol=1e-5)
    asked = []

    def products():
        asked.append(True)
        return jnp.diag(jnp.array([1.0, 4, 9]))

    view = optax_mtl.GramView(T, products)
    chain = optax.chain(optax_mtl.reweigh(optax_mtl.famo(T)), optax_mtl.mgda())
    chain.update(view, chain.init(None), losses=LOSSES[0])
    assert len(asked) == 1
    norms = optax.chain(optax_mtl.reweigh(optax_mtl.inverse_norm()), optax_mtl.mgda())
    weights, _ = norms.update(view, norms.init(None))
    # All as long as one another then, and orthogonal, so that MGDA takes the mean.
    np.testing.assert_allclose(weights / weights[0], [1, 1 / 2, 1 / 3], rtol=1e-5)


def test_reweigh_of_a_method_that_reads_gradients():
    chain = optax.chain(optax_mtl.reweigh(optax_mtl.graddrop()), optax_mtl.mgda())
    with pytest.raises(TypeError, match="reweigh works with the weights"):
        chain.update(GRADIENTS[0], chain.init(jnp.zeros(SIZE)))


def test_reweigh_does_not_move_with_weighted_gradients_that_are_too_large():
    """Gradients of norm 1e18 fit, and 1e4 times as long they do not."""
    weigh = optax_mtl.from_state(
        lambda: jnp.zeros([], jnp.int32),
        lambda state, count: (jnp.full(count, 1e4), state + 1),
        reads=[],
    )
    chain = optax.chain(optax_mtl.reweigh(weigh), optax_mtl.mgda())
    state = chain.init(jnp.zeros(SIZE))
    large = jnp.asarray(GRADIENTS[0] / np.linalg.norm(GRADIENTS[0])) * 1e18
    update, after = chain.update(large, state)
    assert not jnp.isfinite(update).any() and after[0] == 0
    update, after = chain.update(large * 1e-4, state)
    assert jnp.isfinite(update).all() and after[0] == 1


WORK_WITH_WEIGHTS = {
    "reweigh": optax_mtl.reweigh,
    "smooth_weights": lambda method: optax_mtl.smooth_weights(method, 2),
    "update_every": lambda method: optax_mtl.update_every(method, 2, 2),
    "record_conflicts": lambda method: optax_mtl.record_conflicts(2, method),
}


@pytest.mark.parametrize("wrapper", WORK_WITH_WEIGHTS)
def test_an_optimizer_where_weights_are_made(wrapper):
    chain = optax.chain(optax_mtl.mgda(), optax.adam(0.1))
    tx, params = WORK_WITH_WEIGHTS[wrapper](chain), {"w": jnp.zeros(3)}
    message = rf"state of the size of the parameters.*optax.chain\({wrapper}"
    with pytest.raises(TypeError, match=message):
        tx.update({"w": jnp.ones((2, 3))}, tx.init(params), params)


# Products and losses, with a state and without; gradients themselves; a primary task.
RESOLVED = [
    "cagrad",
    "pcd",
    "famo",
    "gcond",
    "moco",
    "imtl",
    "adatask",
    "graddrop",
    "bloop",
]


def test_fixed_weights_beside_each_kind_of_method():
    """What the method makes of the others, in NumPy, and the weighted gradient."""
    methods = {name: optax_mtl.get(name, T) for name in RESOLVED}
    fix = lambda method: optax_mtl.fix_weights(method, [None, 0.25, None])
    others = np.array([1, 0, 1], np.float32)
    run = lambda method, gradients, losses, view=False: all_steps(method, view)(
        gradients, losses
    )
    reads = lambda name: optax_mtl.METHODS[name].reads

    @jax.jit
    def programs():
        expected, found, products = {}, {}, {}
        for name, method in methods.items():
            expected[name] = run(method, others[:, None] * GRADIENTS, others * LOSSES)
            found[name] = run(fix(method), GRADIENTS, LOSSES)
            if "gradients" not in reads(name):
                products[name] = run(fix(method), GRADIENTS, LOSSES, view=True)
        return expected, found, products

    expected, found, products = programs()
    assert set(products) == {"cagrad", "pcd", "famo", "imtl"}
    for name, (updates, states) in expected.items():
        beside = updates + 0.25 * GRADIENTS[:, 1]
        for some in (found, products):
            if name in some:
                compare(some[name][0], beside, rtol=1e-4)
                compare(some[name][1], states)


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_fixed_weights_by_name_in_every_mode(mode):
    """Orthogonal gradients of norms 1 and 2, of which MGDA makes weights .8 and .2."""
    losses_fn = lambda w: {"b": 2 * w[1], "kl": 5 * w.sum(), "a": w[0]}
    method = optax_mtl.fix_weights(optax_mtl.mgda(), {"kl": 0.1})
    resolve = optax_mtl.value_and_grad(losses_fn, method, mode=mode)
    w = jnp.array([1.0, 2.0])
    _, grads, _ = jax.jit(resolve)(w, resolve.init(w))
    np.testing.assert_allclose(grads, [0.8 + 0.5, 0.4 + 0.5], rtol=1e-5)


def test_a_task_of_fixed_weight_that_is_not_finite_stops_the_step():
    method = optax_mtl.fix_weights(optax_mtl.moco(T), [None, None, 0.5])
    state = method.init(jnp.zeros(SIZE))
    bad = np.where(np.arange(T)[:, None] == 2, np.inf, GRADIENTS[0])
    update, after = method.update(bad, state, losses=LOSSES[0])
    assert not np.isfinite(update).any()
    jax.tree.map(np.testing.assert_array_equal, after, state)
    guarded = optax_mtl.zero_nonfinite(method)
    update, _ = guarded.update(bad, state, losses=LOSSES[0])
    assert np.isfinite(update).all()


WRONG = {
    "an unknown name": ({"c": 1.0}, "weights names the task 'c', but the tasks are"),
    "none fixed": ([None, None], "weights fix none of the tasks"),
    "too many": ([None, 1.0, 1.0], "weights have 3 entries.*each of the 2 tasks"),
    "not a number": ({"a": "much"}, "weights"),
    "one number": (0.5, "weights are 0.5, expected a dict from the names of tasks"),
    "many numbers for a task": ({"a": np.ones(2)}, "weights hold .*one number"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_fixed_weights(kind):
    weights, message = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        method = optax_mtl.fix_weights(optax_mtl.mgda(), weights)
        method.update(jnp.eye(2), method.init(None), losses={"a": 1.0, "b": 2.0})


GROUPS = {
    "one left out": ({"x": ["a"], "y": ["b"]}, "groups holds 'a', 'b', but the losses"),
    "one twice": ({"x": ["a", "b"], "y": ["b", "c"]}, "'a', 'b', 'b', 'c', but"),
    "unknown": ({"x": ["a", "b", "d"]}, "each belongs to one task"),
    "a name for a list": ({"x": "abc"}, "groups has 'abc' for the task 'x'"),
    "an empty task": ({"x": ["a", "b", "c"], "y": []}, r"groups has \[\]"),
    "read once": ({"x": (x for x in "abc")}, "expected a list of names"),
    "numbers": ({"x": ["a", "b", 3]}, "groups holds 3, 'a', 'b', but the losses"),
    "no names": ([["a", "b", "c"]], "groups is .*, expected a dict"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_wrong_groups_of_losses(kind):
    groups, message = GROUPS[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        optax_mtl.group_losses({"a": 1.0, "b": 2.0, "c": 3.0}, groups)


def test_groups_of_losses_without_names():
    with pytest.raises(TypeError, match=r"losses is .*, expected a dict"):
        optax_mtl.group_losses(jnp.ones(3), {"x": [0, 1, 2]})


def test_groups_of_losses_are_tasks():
    """Two gradients and not three, each that of its sum."""

    def losses_fn(w):
        losses = {"boxes": w[0], "classes": 2 * w[0], "depth": w[1] ** 2}
        groups = {"detection": ["boxes", "classes"], "depth": ["depth"]}
        return optax_mtl.group_losses(losses, groups)

    losses, grads = optax_mtl.value_and_task_grads(losses_fn)(jnp.array([1.0, 2.0]))
    assert losses == {"detection": 3, "depth": 4}
    np.testing.assert_array_equal(grads, [[0, 4], [3, 0]])
