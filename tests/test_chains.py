"""What follows a method receives the gradient that it resolved, in every mode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mtl
from tests.common import compiled_fast, flops, temporary_memory

MODES = ("gram", "leafwise", "stacked")
RNG = np.random.default_rng(0)
T = 3
PARAMS = {
    "w": RNG.normal(size=(4, 6)).astype(np.float32),
    "b": {"v": RNG.normal(size=6).astype(np.float32), "s": np.float32(0.5)},
}
INPUTS = RNG.normal(size=(8, 4)).astype(np.float32)
TARGETS = RNG.normal(size=(8, T)).astype(np.float32)


def losses_fn(params, inputs=INPUTS, targets=TARGETS):
    hidden = jnp.tanh(inputs @ params["w"] + params["b"]["v"][None])
    out = hidden.reshape(len(inputs), T, 2).sum(axis=2) * params["b"]["s"]
    return jnp.mean((out - targets) ** 2, axis=0)


REST = {
    "clip_by_global_norm": optax.clip_by_global_norm(0.1),
    "clip": optax.clip(0.01),
    "clip_by_block_rms": optax.clip_by_block_rms(0.01),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "scale_by_sign": optax.scale_by_sign(),
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-3),
    "ema": optax.ema(0.9),
    "masked": optax.masked(optax.add_decayed_weights(0.1), {"w": True, "b": False}),
    "partition": optax.partition(
        {"on": optax.adam(1e-3), "off": optax.set_to_zero()}, {"w": "on", "b": "off"}
    ),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
    "multi_steps": optax.MultiSteps(
        optax.sgd(0.1), every_k_schedule=2
    ).gradient_transformation(),
}


def every_other_step(method, other):
    """One method or the other, inside ``jax.lax.cond``."""

    def update(updates, step, params=None, **extra_args):
        resolve = lambda method: method.update(updates, (), params, **extra_args)[0]
        branches = (lambda: resolve(method)), (lambda: resolve(other))
        return jax.lax.cond(step % 2 == 0, *branches), step + 1

    return optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros([], jnp.int32), update
    )


HEADS = {
    "cond": every_other_step(optax_mtl.inverse_norm(), optax_mtl.linear()),
    "smooth_weights": optax_mtl.smooth_weights(optax_mtl.inverse_norm(), T),
    "update_every": optax_mtl.update_every(optax_mtl.inverse_norm(), 2, T),
    "log_losses": optax.chain(optax_mtl.log_losses(), optax_mtl.inverse_norm()),
    "reweigh": optax.chain(
        optax_mtl.reweigh(optax_mtl.dwa(T)), optax_mtl.inverse_norm()
    ),
    "fix_weights": optax_mtl.fix_weights(
        optax_mtl.inverse_norm(), [0.5] + [None] * (T - 1)
    ),
    "record_conflicts": optax.chain(
        optax_mtl.record_conflicts(T), optax_mtl.inverse_norm()
    ),
    "recorded_method": optax_mtl.record_conflicts(T, optax_mtl.dwa(T), every=2),
    "gls": optax_mtl.gls(),
}


def test_the_rest_of_a_chain_sees_the_gradient_in_every_mode():
    """Each transformation after a method, and each method before one; two steps.

    The modes differ in how the matrix and the gradient come about, not in the chain.
    """
    method = optax_mtl.inverse_norm()
    chains = {name: optax.chain(method, tx) for name, tx in REST.items()}
    for name, method in HEADS.items():
        chains[name] = optax.chain(method, optax.clip_by_global_norm(0.1))
    chains["scale_by_agreement"] = optax_mtl.scale_by_agreement(
        optax.chain(optax_mtl.inverse_norm(), optax.adamw(1e-3))
    )
    modes = dict.fromkeys(("gram", "stacked"), chains)
    modes["leafwise"] = {name: chains[name] for name in ("adamw", "update_every")}

    @compiled_fast
    def two_steps(params):
        out = {}
        for mode, chains in modes.items():
            for name, tx in chains.items():
                fn = optax_mtl.value_and_grad(losses_fn, tx, mode=mode)
                step = lambda state, _, fn=fn: fn(params, state)[:0:-1]
                state, updates = jax.lax.scan(step, fn.init(params), length=2)
                out[mode, name] = updates, state
        return out

    found = two_steps(PARAMS)
    for (mode, name), result in found.items():
        close = lambda x, y, name=f"{mode} {name}": np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=1e-5, err_msg=name
        )
        jax.tree.map(close, result, found["stacked", name])


@pytest.mark.parametrize("mode", MODES)
def test_clipping_after_a_method_clips_the_gradient(mode):
    """The gradients (3, 0) and (0, 4) sum to one of norm 5."""
    chain = optax.chain(optax_mtl.linear(), optax.clip_by_global_norm(1.0))
    two = lambda p: jnp.stack([3 * p[0], 4 * p[1]])
    fn = optax_mtl.value_and_grad(two, chain, mode=mode)
    _, update, _ = fn(jnp.ones(2), fn.init(jnp.ones(2)))
    np.testing.assert_allclose(update, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_heads_keep_their_plain_gradient(mode):
    """What follows the method sees the shared part alone."""
    chain = optax.chain(optax_mtl.inverse_norm(), optax.clip_by_global_norm(0.1))
    mask = {"w": True, "b": False}
    fn = optax_mtl.value_and_grad(losses_fn, chain, mode=mode, shared=mask)
    _, updates, _ = fn(PARAMS, fn.init(PARAMS))
    of_sum = jax.grad(lambda p: losses_fn(p).sum())(PARAMS)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, updates["b"], of_sum["b"])
    np.testing.assert_allclose(np.linalg.norm(updates["w"]), 0.1, rtol=1e-5)


FORGOTTEN = {
    "adamw": optax.adamw(1e-3),
    "identity": optax.identity(),
    "adam before the method": optax.chain(optax.adam(1e-3), optax_mtl.upgrad()),
    "two methods": optax.chain(optax_mtl.gls(), optax_mtl.pcgrad()),
    "nothing for some": optax.masked(optax_mtl.upgrad(), {"w": True, "b": False}),
    "stacked heads": optax.partition(
        {"shared": optax_mtl.upgrad(), "heads": optax.identity()},
        {"w": "shared", "b": "heads"},
    ),
    "Adam for the heads": optax.partition(
        {"shared": optax_mtl.upgrad(), "heads": optax.adam(1e-3)},
        {"w": "shared", "b": "heads"},
    ),
    "selective_transform": optax.selective_transform(
        optax_mtl.upgrad(), freeze_mask={"w": False, "b": True}
    ),
    "nothing for the frozen": optax.partition(
        {"train": optax_mtl.upgrad(), "freeze": optax.set_to_zero()},
        {"w": "train", "b": "freeze"},
    ),
}


@pytest.mark.parametrize("name", FORGOTTEN)
@pytest.mark.parametrize("mode", MODES)
def test_chains_that_leave_the_task_axis_are_refused(name, mode):
    fn = optax_mtl.value_and_grad(losses_fn, FORGOTTEN[name], mode=mode)
    remedy = "begin.* with a method|per_task|one method comes first"
    promotion = jax.numpy_rank_promotion("allow")  # As users have it.
    with promotion, pytest.raises((TypeError, ValueError), match=remedy):
        jax.eval_shape(fn, PARAMS, fn.init(PARAMS))


def test_chains_cost_what_their_parts_cost():
    """The rest of the chain inside takes no more passes and memory than outside."""
    params = {"w": jnp.ones((4, 6)), "b": PARAMS["b"]}
    batch = jnp.ones((64, 4)), jnp.ones((64, T))
    rest = optax.clip_by_global_norm(0.1)
    for method in (optax_mtl.inverse_norm(), optax_mtl.gls()):
        inside = optax_mtl.value_and_grad(losses_fn, optax.chain(method, rest))
        alone = optax_mtl.value_and_grad(losses_fn, method)

        def outside(params, state, *batch, alone=alone):
            losses, grads, state = alone(params, state[0], *batch)
            return losses, rest.update(grads, rest.init(params), params)[0], state

        state = inside.init(params)
        for measure in (flops, temporary_memory):
            most = measure(outside, params, state, *batch)
            assert measure(inside, params, state, *batch) <= 1.01 * most
    of_sum = jax.value_and_grad(lambda *args: losses_fn(*args).sum())
    plain = flops(of_sum, params, *batch)
    assert flops(inside, params, state, *batch) <= 1.1 * plain  # gls: one backward.


def test_the_gram_matrix_is_computed_once():
    """Around a chain, where the wrapper measures as well as the method."""
    chain = optax.chain(optax_mtl.inverse_norm(), optax.sgd(0.1))
    around = optax_mtl.scale_by_agreement(chain)
    batch = jnp.ones((256, 4)), jnp.ones((256, T))
    cost = []
    for tx in (chain, around):
        fn = optax_mtl.value_and_grad(losses_fn, tx)
        cost.append(flops(fn, PARAMS, fn.init(PARAMS), *batch))
    assert cost[1] <= 1.1 * cost[0]


STACKED = jax.tree.map(lambda p: np.stack([p] * T), PARAMS)


@pytest.mark.parametrize("name", FORGOTTEN)
def test_checked_chains_refuse_to_broadcast(name):
    tx = optax_mtl.checked(FORGOTTEN[name])
    remedy = "begin.* with a method|per_task|one method comes first"
    promotion = jax.numpy_rank_promotion("allow")
    update = lambda *args: tx.update(*args, losses=jnp.ones(T))
    with promotion, pytest.raises(ValueError, match=remedy):
        jax.eval_shape(update, STACKED, tx.init(PARAMS), PARAMS)


def test_checked_chains_are_the_same_chains():
    chain = optax.chain(optax_mtl.linear(), optax.adamw(1e-3))
    tx = optax_mtl.checked(chain)
    out, state = tx.update(STACKED, tx.init(PARAMS), PARAMS)
    expected = chain.update(STACKED, chain.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (out, state), expected)


@pytest.mark.parametrize("trunk", ["method", "forgotten"])
def test_checked_chains_guard_flax_optimizers(trunk):
    """``nnx.Optimizer`` would make a kernel (4, 1) one of (2, 4, 1)."""
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    first = optax_mtl.linear() if trunk == "method" else optax.identity()
    tx = optax_mtl.checked(optax.chain(first, optax.sgd(0.1)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(lambda p: jnp.stack([p, p]), nnx.state(model, nnx.Param))
    if trunk == "forgotten":
        with pytest.raises(ValueError, match=r"\['bias'\] has.*begin the chain"):
            optimizer.update(model, grads)
    else:
        optimizer.update(model, grads)
    assert model.kernel.shape == (4, 1)


def test_freezing():
    """The frozen part stays, and takes no part in the Gram matrix."""
    labels = {"w": "train", "b": "freeze"}
    train = optax.chain(optax_mtl.inverse_norm(), optax.sgd(0.1))
    freeze = optax.chain(optax_mtl.sum_tasks(), optax.set_to_zero())
    tx = optax_mtl.checked(optax.partition({"train": train, "freeze": freeze}, labels))
    _, updates = optax_mtl.value_and_task_grads(losses_fn)(PARAMS)
    out, _ = tx.update(updates, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), out["b"])
    # The other way: what is frozen is no parameter.
    frozen = lambda w, b: losses_fn({"w": w, "b": b})
    resolve = optax_mtl.value_and_grad(frozen, train)
    _, alone, _ = resolve(PARAMS["w"], resolve.init(PARAMS["w"]), PARAMS["b"])
    np.testing.assert_allclose(out["w"], alone, rtol=1e-4, atol=1e-6)
