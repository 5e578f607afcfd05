"""``check`` finds what is wrong with a chain, and nothing where nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optax_mtl
from optax_mtl import check

T = 3
PARAMS = {
    "trunk": jax.ShapeDtypeStruct((4, 6), jnp.float32),
    "heads": jax.ShapeDtypeStruct((6, 3), jnp.float32),
}
LABELS = {"trunk": "shared", "heads": "heads"}
SHARED = {"trunk": True, "heads": False}
METHOD, ADAM = optax_mtl.upgrad(), optax.adam(1e-3)
CHAIN = optax.chain(METHOD, ADAM)


def parted(shared, heads):
    routes = {"shared": shared, "heads": heads}
    return optax.chain(optax.partition(routes, LABELS), ADAM)


def changing(first, then):
    """A state of another type than it began with."""
    return optax.GradientTransformation(
        lambda params: jnp.asarray(first),
        lambda u, state, params=None: (u, then(state)),
    )


def forgetful():
    return optax.GradientTransformation(
        lambda params: (jnp.zeros([]),),
        lambda updates, state, params=None: (updates, [*state]),
    )


def adding_an_axis():
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: g[None], updates))


NO_METHOD = "there is no method in this chain: the update of params['heads'] has shape"
UNRESOLVED = (
    "the method does not see all gradients: the update of params['heads'] has shape"
    " (3, 6, 3), the parameter (6, 3). If the tasks share this parameter, let a method"
    " resolve it; if it is a head, leave its gradient unstacked by shared="
)
STACKED_STATE = (
    "has shape (3, 6, 3), expected (6, 3). What comes before the method sees the"
    " gradients of all tasks stacked: wrap it as optax_mtl.per_task(tx, num_tasks)"
)
MIXED = "the method does not come first: what precedes it mixes the gradients"
ROUTE = "lead them around the method by optax.partition({'shared': method,"
NEEDS_LOSSES = "this method reads the losses of the tasks"

MISUSE = {
    "no method": (ADAM, {}, NO_METHOD),
    "no method, multi-steps": (
        optax.MultiSteps(ADAM, 2),
        {},
        "take optax_mtl.apply_if_finite and optax_mtl.multi_steps",
    ),
    "heads stacked": (parted(METHOD, optax.identity()), {}, UNRESOLVED),
    "heads with Adam": (parted(METHOD, ADAM), {}, UNRESOLVED),
    "heads set to zero": (parted(METHOD, optax.set_to_zero()), {}, UNRESOLVED),
    "a group by name": (
        parted(METHOD, optax.identity()),
        {"labels": LABELS},
        "the update of params['heads'] (group 'heads') has shape",
    ),
    "masked": (optax.chain(optax.masked(METHOD, SHARED), ADAM), {}, UNRESOLVED),
    "selective": (
        optax.selective_transform(CHAIN, freeze_mask={"trunk": False, "heads": True}),
        {},
        UNRESOLVED,
    ),
    "Adam first": (optax.chain(ADAM, METHOD), {}, STACKED_STATE),
    "momentum first": (optax.chain(optax.trace(0.9), CHAIN), {}, STACKED_STATE),
    "clipped first": (optax.chain(optax.clip_by_global_norm(1.0), CHAIN), {}, MIXED),
    "clipped first, around parts": (
        optax.chain(optax.clip_by_global_norm(1.0), parted(METHOD, optax.identity())),
        {"shared": SHARED},
        MIXED,
    ),
    "normalised first": (
        optax.chain(optax.normalize_by_update_norm(), CHAIN),
        {},
        MIXED,
    ),
    "clipped first, in a condition": (
        optax_mtl.apply_if_finite(
            optax.chain(optax.clip_by_global_norm(1.0), CHAIN), max_consecutive_errors=5
        ),
        {},
        MIXED,
    ),
    "clipped first, accumulated": (
        optax_mtl.multi_steps(
            optax.chain(optax.clip_by_global_norm(1.0), CHAIN), 2, num_tasks=T
        ),
        {},
        MIXED,
    ),
    "two methods": (optax.chain(METHOD, CHAIN), {}, "and no second"),
    "heads not stacked": (CHAIN, {"shared": SHARED}, ROUTE),
    "heads not stacked, summed": (
        parted(METHOD, optax_mtl.sum_tasks()),
        {"shared": SHARED},
        ROUTE,
    ),
    "another T": (
        optax.chain(optax_mtl.gcond(4), ADAM),
        {},
        "the method was made for num_tasks=4, but the updates hold the gradients of 3",
    ),
    "no losses": (optax.chain(optax_mtl.gls(), ADAM), {"losses": None}, NEEDS_LOSSES),
    "losses of another T": (
        CHAIN,
        {"losses": {"a": jax.ShapeDtypeStruct((), jnp.float32)}},
        "losses have shape (1,), expected one scalar for each of the 3 tasks",
    ),
    "a whole chain made conditional": (
        optax.apply_if_finite(CHAIN, 5),
        {},
        "Optax's conditional wrappers fail",
    ),
    "a whole chain in MultiSteps": (
        optax.MultiSteps(CHAIN, 2),
        {},
        "optax_mtl.multi_steps takes the place of optax.MultiSteps",
    ),
    "an axis too many": (
        optax.chain(METHOD, adding_an_axis(), optax.sgd(0.1)),
        {},
        "the update of params['heads'] has shape (1, 6, 3), the parameter (6, 3),"
        " which would broadcast to it",
    ),
    "another dtype": (
        optax.chain(METHOD, changing(np.int32(0), lambda state: state + np.float32(1))),
        {},
        "state[1] is int32 at first and float32 after an update, so that a step is"
        " traced twice, and jax.lax.scan refuses it",
    ),
    "a weak type": (
        optax.chain(METHOD, changing(0.0, lambda state: state + np.float32(1))),
        {},
        "state[1] is float32 (weakly typed) at first and float32 after an update, so"
        " that a step is traced twice",
    ),
    "another structure": (
        optax.chain(METHOD, forgetful()),
        {},
        "the update changes the structure of the state",
    ),
    "not called": (optax_mtl.upgrad, {}, "expected a gradient transformation"),
    "no parameters": (CHAIN, {"params": {}}, "holds no arrays"),
    "integers": (CHAIN, {"params": {"n": jnp.arange(3)}}, "has dtype int32"),
    "no number": (CHAIN, {"num_tasks": 2.0}, "num_tasks is 2.0"),
    "nothing shared": (CHAIN, {"shared": lambda path: "body" in path}, "marks none"),
    "no labels": (
        CHAIN,
        {"labels": {"trunk": "a"}},
        "labels should have the structure",
    ),
}


def message(call):
    """What the call raises, notes included."""
    with pytest.raises((TypeError, ValueError)) as info:
        call()
    return "\n".join([str(info.value), *getattr(info.value, "__notes__", [])])


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name):
    tx, options, expected = MISUSE[name]
    options = {"params": PARAMS, "num_tasks": T} | options
    with jax.numpy_rank_promotion("raise"):
        assert expected in message(lambda: check(tx, **options))


def test_every_method_passes_in_a_right_chain():
    for name in optax_mtl.METHODS:
        method = optax_mtl.get(name, T)
        check(optax.chain(method, optax.adamw(1e-3)), PARAMS, T)
        check(parted(method, optax.identity()), PARAMS, T, shared=SHARED)
        check(optax.chain(method, optax.sgd(0.1)), jnp.zeros((2, 2), jnp.bfloat16), T)


def written_elsewhere():
    """Measures what differs from the mean: mixes the tasks, since it is a method."""

    def update(updates, state, params=None, *, losses=None):
        centred = jax.tree.map(lambda g: g - g.mean(axis=0, keepdims=True), updates)
        weights = 1 / (1 + jnp.diagonal(optax_mtl.gram(centred)))
        return optax_mtl.combine(weights, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


clip = optax.clip_by_global_norm(1.0)
RIGHT = {
    "written elsewhere": optax.chain(written_elsewhere(), ADAM),
    "clipped for each task": optax.chain(optax_mtl.per_task(clip, T), CHAIN),
    "clipped after": optax.chain(METHOD, clip, ADAM),
    "changed one by one": optax.chain(optax.clip(1.0), optax.zero_nans(), CHAIN),
    "logarithms": optax.chain(optax_mtl.log_losses(), CHAIN),
    "balanced": optax.chain(optax_mtl.reweigh(optax_mtl.loss_balancer(T)), CHAIN),
    "accumulated": optax_mtl.multi_steps(CHAIN, 2, T),
    "made conditional": optax_mtl.apply_if_finite(CHAIN, 5),
    "conditional after": optax.chain(METHOD, optax.apply_if_finite(ADAM, 5)),
    "checked": optax_mtl.checked(CHAIN),
    "in groups": optax_mtl.per_group(METHOD, lambda path: path),
    "summed": parted(METHOD, optax_mtl.sum_tasks()),
    "frozen": parted(METHOD, optax.chain(optax_mtl.sum_tasks(), optax.set_to_zero())),
    "scheduled": optax.chain(
        METHOD, optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0, 1, 9))
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_passes(name):
    check(RIGHT[name], PARAMS, T)
    check(RIGHT[name], PARAMS, T, labels=LABELS)


def test_an_optimizer_of_nnx():
    model = nnx.Dict(
        trunk=nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        norm=nnx.BatchNorm(6, rngs=nnx.Rngs(0)),
        heads=nnx.Linear(6, T, rngs=nnx.Rngs(0)),
    )
    optimizer_of = lambda tx: nnx.Optimizer(model, tx, wrt=nnx.Param)
    trunk = nnx.PathContains("trunk")
    label = lambda path, _: "shared" if "trunk" in str(path) else "heads"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    routes = {"shared": optax_mtl.gls(), "heads": optax.identity()}
    right = optimizer_of(optax.chain(optax.partition(routes, labels), ADAM))
    check(right, model, T, shared=trunk)
    check(right, nnx.state(model), T, shared=trunk)
    assert "the update of params['heads']['bias'] has shape (3, 3)" in message(
        lambda: check(right, model, T)
    )
    assert NEEDS_LOSSES in message(
        lambda: check(right, model, T, shared=trunk, losses=None)
    )
    assert "params['heads']['bias']" in message(
        lambda: check(optimizer_of(ADAM), model, T)
    )
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert "hand over the model of this nnx.Optimizer" in message(
        lambda: check(right, pure, T, shared=trunk)
    )
    del model.norm
    assert "the state that is held was made by another chain" in message(
        lambda: check(right, model, T, shared=trunk)
    )


def test_a_train_state():
    params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), PARAMS)
    create = lambda tx: train_state.TrainState.create(
        apply_fn=None, params=params, tx=tx
    )
    check(create(CHAIN), params, T)
    assert NO_METHOD in message(lambda: check(create(ADAM), params, T))
    reads = create(optax.chain(optax_mtl.gls(), ADAM))
    found = message(lambda: check(reads, params, T))
    assert NEEDS_LOSSES in found
    assert "take optax_mtl.linen.TrainState" in found


def test_computes_nothing():
    """A billion parameters for 64 tasks, of which there are only the shapes."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params = {"embed": struct(50_000, 10_000), "out": struct(10_000, 50_000)}
    check(optax.chain(optax_mtl.cagrad(), optax.adamw(1e-3)), params, 64)
    with pytest.raises(ValueError, match="there is no method"):
        check(optax.adamw(1e-3), params, 64)


@pytest.mark.parametrize(
    "first", [optax.adaptive_grad_clip(0.1), optax.contrib.muon(1e-3)]
)
def test_what_fails_before_the_method_is_told_to_go_after_it(first):
    """Optax's own error, of shapes, says nothing of tasks."""
    after = "put it after the method, or wrap it as optax_mtl.per_task(tx, num_tasks=3)"
    assert after in message(lambda: check(optax.chain(first, CHAIN), PARAMS, T))
    assert after not in message(
        lambda: check(optax.chain(CHAIN, optax.lbfgs()), PARAMS, T)
    )


def test_the_number_of_tasks_is_an_integer():
    check(CHAIN, PARAMS, np.int64(T))  # As len and shapes of NumPy's give it.
    for wrong in (True, 3.0, 0):
        with pytest.raises(ValueError, match="num_tasks is"):
            check(CHAIN, PARAMS, wrong)
