"""What a losses function, a step or a model may not be, and what is said then."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

PARAMS = {"trunk": np.ones((4, 2), np.float32), "head": np.ones(2, np.float32)}
X = np.ones((4, 4), np.float32)
WAYS = {
    "stacked": lambda fn, p: optax_mtl.value_and_task_grads(fn)(p),
    "in turn": lambda fn, p: optax_mtl.value_and_task_grads(fn, sequential=True)(p),
    "gram": lambda fn, p: resolve(fn, p, "gram"),
    "leafwise": lambda fn, p: resolve(fn, p, "leafwise"),
    "resolved": lambda fn, p: resolve(fn, p, "stacked"),
    "accumulated": lambda fn, p: optax_mtl.accumulate_task_grads(lambda p, x: fn(p), 2)(
        p, X
    ),
    "one each": lambda fn, p: optax_mtl.accumulate_task_grads(
        lambda p, x: fn(p), 2, one_task_each=True
    )(p, X),
    "at features": lambda fn, p: at_features(lambda p, x: p, lambda _, z, x: fn(z), p),
}


def resolve(fn, params, mode):
    call = optax_mtl.value_and_grad(fn, optax_mtl.upgrad(), mode=mode)
    return call(params, call.init(params))


def at_features(trunk_fn, heads_fn, params):
    fn = optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, optax_mtl.upgrad())
    return fn(params, fn.init(params, X), X)


total = lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(p))
ONE_LOSS_EACH = "losses_fn should return one loss for each task"
LOSSES = {
    "an array among scalars": (
        lambda p: {"a": p["trunk"], "b": total(p)},
        ONE_LOSS_EACH + r".*returned shapes \{'a': \(4, 2\), 'b': \(\)\}",
    ),
    "an array for each example": (
        lambda p: p["trunk"],
        ONE_LOSS_EACH + r".*\(4, 2\).*average each over its batch",
    ),
    "a sum": (total, ONE_LOSS_EACH + r".*returned shapes \(\); do not sum"),
    "nothing": (lambda p: {}, ONE_LOSS_EACH),
    "integers": (
        lambda p: {"a": total(p), "hits": jnp.sum(p["head"] > 0)},
        r"losses\['hits'\] has dtype int32, and so no gradient; .* has_aux=True",
    ),
    "text": (lambda p: {"a": total(p), "b": "x"}, r"hold 'x'|'str'"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_none(kind):
    """In every way to get gradients, when it is traced."""
    fn, message = LOSSES[kind]
    for name, way in WAYS.items():
        with pytest.raises((TypeError, ValueError), match=message):
            jax.eval_shape(lambda p, way=way: way(fn, p), PARAMS)
            pytest.fail(name)


def test_constants_among_the_losses_are_absent_tasks():
    """A Python number is one; its gradient is zero."""
    fn = lambda p: {"a": total(p), "b": 0}
    for way in (WAYS["stacked"], WAYS["accumulated"]):
        losses, grads = way(fn, PARAMS)
        assert losses["b"] == 0
        np.testing.assert_array_equal(grads["head"], [[1, 1], [0, 0]])


@pytest.mark.parametrize("way", WAYS)
def test_a_model_without_parameters(way):
    fn = lambda p: {"a": jnp.ones([]), "b": jnp.zeros([])}
    with pytest.raises((TypeError, ValueError), match=r"holds no arrays|floating"):
        WAYS[way](fn, {"trunk": None})


def test_no_parameter_is_shared():
    """In every way and mode, from ``init`` on."""
    fn = lambda p: {"a": total(p), "b": total(p)}
    by_mode = {
        mode: optax_mtl.value_and_grad(fn, optax_mtl.upgrad(), mode=mode, shared=False)
        for mode in ("gram", "leafwise", "stacked")
    }
    of_batch = lambda p, x: fn(p)
    calls = [
        *(lambda r=r: r.init(PARAMS) for r in by_mode.values()),
        *(lambda r=r: r(PARAMS, optax.EmptyState()) for r in by_mode.values()),
        lambda: optax_mtl.value_and_task_grads(fn, shared=False)(PARAMS),
        lambda: optax_mtl.accumulate_task_grads(of_batch, 2, shared=False)(PARAMS, X),
        lambda: optax_mtl.multi_steps(optax_mtl.mean(), 2, 2, shared=False).init(
            PARAMS
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="shared marks none of the parameters"):
            call()


def update(method):
    return method.update(jnp.eye(2), method.init(None))


def of_state(init_fn, step, reads=("gram",)):
    return lambda: update(optax_mtl.from_state(init_fn, step, reads=reads))


keep = lambda state, gram: (jnp.ones(2), state)
STEPS = {
    "a number as a state": (of_state(lambda: 0.0, keep), "init_fn returned 0.0 as st"),
    "a number in a state": (
        of_state(lambda: {"count": 0}, keep),
        r"returned 0 as state\['count'\], which is no array: .*jnp.zeros\(\[\]",
    ),
    "another structure": (
        of_state(lambda: (jnp.zeros(2),), lambda s, gram: (jnp.ones(2), [*s])),
        "a step should return a state like the one it got, from init_fn, but it chang",
    ),
    "another shape": (
        of_state(lambda: jnp.zeros(2), lambda s, gram: (jnp.ones(2), s[:1])),
        r"but state has shape \(1,\), expected \(2,\)",
    ),
    "weights alone": (
        of_state(lambda: jnp.zeros(2), lambda s, gram: jnp.ones(2)),
        r"a step should return a pair, .* but returned shapes \(2,\)",
    ),
    "text to read": (
        of_state(lambda: jnp.zeros(2), keep, "gram"),
        r"reads is 'gram'; it should be a list, such as \['gram'\]",
    ),
    "something to read": (
        of_state(lambda: jnp.zeros(2), keep, ["grams"]),
        "reads is 'grams'; it should be 'gram' or 'losses'",
    ),
    "no function": (lambda: optax_mtl.from_gram(3), "weights_fn is 3; it should be a"),
    "no function of losses": (lambda: optax_mtl.from_losses("x"), "weights_fn is 'x'"),
    "a list of weights": (
        lambda: update(optax_mtl.from_gram(lambda gram: [1.0, 2.0])),
        r"the weights are \[1.0, 2.0\], expected an array of shape \(2,\)",
    ),
    "no weights": (
        lambda: update(optax_mtl.from_gram(lambda gram: None)),
        r"the weights are None, expected an array of shape \(2,\)",
    ),
    "another number of tasks than the reference is for": (
        lambda: optax_mtl.igb(3, reference=1.0).update(
            jnp.eye(2), optax.EmptyState(), losses=jnp.ones(2)
        ),
        "the method was made for num_tasks=3, but the updates hold the gradients of 2",
    ),
    "another number of tasks than the ideal point is for": (
        lambda: optax_mtl.stch(3, objective="linear").update(
            jnp.eye(2), optax.EmptyState(), losses=jnp.ones(2)
        ),
        "the method was made for num_tasks=3, but the updates hold the gradients of 2",
    ),
    "no name": (lambda: optax_mtl.get(None, 2), "there is no method None; known are"),
    "a list of names": (lambda: optax_mtl.get(["mgda"], 2), r"no method \['mgda'\]"),
    "no number of tasks": (lambda: optax_mtl.get("mgda", None), "num_tasks is None"),
    "no task": (lambda: optax_mtl.METHODS["mgda"].make(0), "num_tasks is 0; it should"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_methods_that_are_none(kind):
    call, message = STEPS[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


NOT_CALLED = {
    "value_and_grad": lambda tx: optax_mtl.value_and_grad(jnp.sin, tx),
    "its optimizer": lambda tx: optax_mtl.value_and_grad(
        jnp.sin, optax_mtl.upgrad(), optimizer=tx
    ),
    "at features": lambda tx: optax_mtl.value_and_grad_at_features(
        jnp.sin, jnp.sin, tx
    ),
    "per_task": lambda tx: optax_mtl.per_task(tx, 2),
    "per_group": lambda tx: optax_mtl.per_group(tx, {"w": "a"}),
    "reweigh": optax_mtl.reweigh,
    "record_conflicts": lambda tx: optax_mtl.record_conflicts(2, tx),
    "fix_weights": lambda tx: optax_mtl.fix_weights(tx, [None, 1.0]),
    "smooth_weights": lambda tx: optax_mtl.smooth_weights(tx, 2),
    "update_every": lambda tx: optax_mtl.update_every(tx, 2, 2),
    "sharded": lambda tx: optax_mtl.with_sharded_parameters(tx, "data"),
    "agreement": lambda tx: optax_mtl.scale_by_agreement(tx),
    "multi_steps": lambda tx: optax_mtl.multi_steps(tx, 2, 2),
    "apply_if_finite": lambda tx: optax_mtl.apply_if_finite(tx, 2),
    "checked": optax_mtl.checked,
    "zero_nonfinite": optax_mtl.zero_nonfinite,
}


@pytest.mark.parametrize("kind", NOT_CALLED)
def test_a_transformation_that_was_not_called(kind):
    message = r"(tx|method|optimizer) is <function \w+.*call what makes it"
    with pytest.raises(TypeError, match=message):
        NOT_CALLED[kind](optax_mtl.upgrad)
    NOT_CALLED[kind](optax_mtl.upgrad())
