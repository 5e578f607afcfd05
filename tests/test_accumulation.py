"""Accumulated gradients are averages, at the cost of what they average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from tests.common import flops, temporary_memory

T, K, BATCH = 3, 6, 24
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(BATCH, 8)), jnp.float32)
NAMES = [f"head_{i}" for i in range(T)]
MASK = {"trunk": True, **dict.fromkeys(NAMES, False)}


def make_params(width=16, outputs=32):
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    heads = {name: draw(width, outputs) for name in NAMES}
    return {"trunk": draw(8, width), **heads}


PARAMS = make_params()


def losses_fn(params, inputs):
    features = jnp.tanh(inputs @ params["trunk"])
    return {name: jnp.mean(jnp.tanh(features @ params[name]) ** 2) for name in NAMES}


def assert_close(tree, other, rtol=1e-5, atol=1e-7):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
    jax.tree.map(close, tree, other)


@pytest.mark.parametrize("shared", [None, MASK])
def test_exact_mode_is_the_gradient_of_the_whole_batch(shared):
    whole = optax_mtl.value_and_task_grads(losses_fn, shared=shared)(PARAMS, INPUTS)
    fn = jax.jit(optax_mtl.accumulate_task_grads(losses_fn, K, shared=shared))
    assert_close(fn(PARAMS, INPUTS), whole)


@pytest.mark.parametrize("as_vector", [False, True])
def test_each_task_sees_its_own_micro_batches(as_vector):
    """Micro-batch k holds the examples k, k + K, ... and serves task k mod T."""
    as_array = lambda *args: jnp.stack(list(losses_fn(*args).values()))
    fn = optax_mtl.accumulate_task_grads(
        as_array if as_vector else losses_fn, K, one_task_each=True
    )
    losses, updates = jax.jit(fn)(PARAMS, INPUTS)
    for i, name in enumerate(NAMES):
        mine = INPUTS[np.arange(BATCH) % K % T == i]
        one = lambda params, name=name, mine=mine: losses_fn(params, mine)[name]
        loss, grads = jax.value_and_grad(one)(PARAMS)
        np.testing.assert_allclose(losses[i if as_vector else name], loss, rtol=1e-6)
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), grads)


def test_other_heads_and_losses_are_not_computed():
    params, batch = make_params(width=64, outputs=256), INPUTS[: 4 * T]
    fn = optax_mtl.accumulate_task_grads(losses_fn, T, shared=MASK, one_task_each=True)
    one = jax.value_and_grad(lambda *args: losses_fn(*args)["head_0"])
    every = jax.value_and_grad(lambda *args: sum(losses_fn(*args).values()))
    cost = flops(fn, params, batch) / T
    assert cost <= 1.2 * flops(one, params, batch[:4])
    assert cost <= 0.5 * flops(every, params, batch[:4])


def test_micro_batches_take_the_memory_of_one():
    params = make_params(width=64, outputs=256)
    fn = optax_mtl.accumulate_task_grads(losses_fn, T, shared=MASK, one_task_each=True)
    one = jax.value_and_grad(lambda *args: losses_fn(*args)["head_0"])
    memory = temporary_memory(fn, params, jnp.ones((256 * T, 8)))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert memory <= temporary_memory(one, params, jnp.ones((256, 8))) + 2 * size


def test_accumulators_in_bfloat16():
    fn = optax_mtl.accumulate_task_grads(losses_fn, K, dtype=jnp.bfloat16)
    _, updates = jax.jit(fn)(PARAMS, INPUTS)
    _, expected = optax_mtl.value_and_task_grads(losses_fn)(PARAMS, INPUTS)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}
    difference = optax.tree.norm(optax.tree.sub(updates, expected))
    assert difference < K * 2**-8 * optax.tree.norm(expected)


@pytest.mark.parametrize("one_task_each", [False, True])
def test_auxiliary_data_of_each_micro_batch(one_task_each):
    with_aux = lambda params, x, scale: (losses_fn(params, scale * x), x[0, 0])
    fn = optax_mtl.accumulate_task_grads(
        with_aux, K, has_aux=True, one_task_each=one_task_each
    )
    (losses, aux), _ = fn(PARAMS, INPUTS, scale=1.0)
    np.testing.assert_array_equal(aux, INPUTS[:K, 0])
    assert list(losses) == NAMES


def test_micro_batches_stay_on_their_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = jnp.tile(INPUTS, (2, 1))
    fn = jax.jit(optax_mtl.accumulate_task_grads(losses_fn, K))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    assert_close(
        jax.device_get(fn(params, sharded)), jax.device_get(fn(PARAMS, inputs))
    )
    assert "all-to-all" not in fn.lower(params, sharded).compile().as_text()


@pytest.mark.parametrize("one_task_each", [False, True])
def test_shard_map(one_task_each):
    """Each device accumulates its own examples; the averages are over all of them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    fn = optax_mtl.accumulate_task_grads(
        losses_fn, T, shared=MASK, one_task_each=one_task_each
    )

    def local(params, inputs):
        params = jax.lax.pcast(params, "data", to="varying")
        return jax.lax.pmean(fn(params, inputs), "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    # On one device the same micro-batches are those of four interleaved parts.
    parts = INPUTS.reshape(4, -1, T, INPUTS.shape[1])
    in_order = parts.swapaxes(0, 1).reshape(INPUTS.shape)
    assert_close(jax.jit(sharded)(PARAMS, INPUTS), jax.jit(fn)(PARAMS, in_order))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="choose another batch size"):
        optax_mtl.accumulate_task_grads(losses_fn, 5)(PARAMS, INPUTS)
    fn = optax_mtl.accumulate_task_grads(losses_fn, 4, one_task_each=True)
    with pytest.raises(ValueError, match=r"num_microbatches=4 .* use 3 or 6"):
        fn(PARAMS, INPUTS)
    with pytest.raises(ValueError, match=r"every_k=2 .* use 3"):
        optax_mtl.multi_steps(optax.identity(), 2, T, one_task_each=True)


LABELS = {name: "trunk" if name == "trunk" else "heads" for name in PARAMS}
CHAIN = optax.chain(
    optax.partition(
        {"trunk": optax_mtl.dwa(T, window=1), "heads": optax.identity()}, LABELS
    ),
    optax.adam(1e-2),
)


def feed(tx, state, calls, one_task_each=False, params=PARAMS):
    """Hands over one micro-batch a call, as a data loader would."""
    update = jax.jit(tx.update)
    out = []
    for k in calls:
        mine = INPUTS[k % K :: K]
        if one_task_each:
            name = NAMES[int(optax_mtl.next_task(state))]
            one = lambda p, name=name, mine=mine: losses_fn(p, mine)[name]
            losses, grads = jax.value_and_grad(one)(params)
        else:
            grads_fn = optax_mtl.value_and_task_grads(losses_fn, shared=MASK)
            losses, grads = grads_fn(params, mine)
        updates, state = update(grads, state, params, losses=losses)
        out.append((updates, state))
    return out


@pytest.mark.parametrize("one_task_each", [False, True])
def test_multi_steps_is_one_step_with_the_averages(one_task_each):
    tx = optax_mtl.multi_steps(CHAIN, K, T, shared=MASK, one_task_each=one_task_each)
    state = tx.init(PARAMS)
    out = feed(tx, state, range(K), one_task_each)
    for updates, waiting in out[:-1]:
        assert not optax_mtl.has_updated(waiting)
        assert not any(jnp.any(x) for x in jax.tree.leaves(updates))
        jax.tree.map(
            np.testing.assert_array_equal,
            waiting.inner_opt_state,
            state.inner_opt_state,
        )
    updates, last = out[-1]
    assert optax_mtl.has_updated(last)
    assert not any(jnp.any(x) for x in jax.tree.leaves(last.acc_grads))
    accumulate = optax_mtl.accumulate_task_grads(
        losses_fn, K, shared=MASK, one_task_each=one_task_each
    )
    losses, grads = accumulate(PARAMS, INPUTS)
    expected, inner = CHAIN.update(grads, CHAIN.init(PARAMS), PARAMS, losses=losses)
    assert_close(updates, expected, atol=1e-6)
    assert_close(last.inner_opt_state, inner)


def test_multi_steps_in_low_precision_and_without_losses():
    chain = optax.chain(optax_mtl.cagrad(), optax.sgd(0.1))
    tx = optax_mtl.multi_steps(chain, 2, T, accumulator_dtype=jnp.bfloat16)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda p: jnp.ones((T, *p.shape)), PARAMS)
    update = jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(grads, state, PARAMS)
    assert {x.dtype.name for x in jax.tree.leaves(state.acc_grads)} == {"bfloat16"}
    assert update._cache_size() == 1
    assert state.gradient_step == 2
    assert all(jnp.all(x < 0) for x in jax.tree.leaves(updates))


def test_multi_steps_refuses_other_updates():
    tx = optax_mtl.multi_steps(CHAIN, K, T)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="same leading task axis"):
        tx.update(PARAMS, state, PARAMS)
    grads = jax.tree.map(lambda p: jnp.ones((T + 1, *p.shape)), PARAMS)
    with pytest.raises(ValueError, match="num_tasks=4"):
        tx.update(grads, state, PARAMS)


def test_checkpoint_in_the_middle(tmp_path):
    tx = optax_mtl.multi_steps(CHAIN, K, T, shared=MASK)
    out = feed(tx, tx.init(PARAMS), range(K))
    middle = out[K // 2 - 1][1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", middle)
    rest = feed(tx, restored, range(K // 2, K))
    jax.tree.map(np.testing.assert_array_equal, rest[-1], out[-1])


def test_in_train_state():
    chain = optax.chain(optax_mtl.mean(), optax.sgd(0.1))
    tx = optax_mtl.multi_steps(chain, 2, T)
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    _, grads = optax_mtl.value_and_task_grads(losses_fn)(PARAMS, INPUTS)
    state = state.apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    state = state.apply_gradients(grads=grads)
    assert jnp.any(state.params["trunk"] != PARAMS["trunk"])


def test_in_nnx_optimizer():
    model = nnx.Linear(8, T, rngs=nnx.Rngs(0))
    chain = optax.chain(optax_mtl.mean(), optax.sgd(0.1))
    tx = optax_mtl.multi_steps(chain, 2, T)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, params = nnx.split(model)
    squares = lambda params: jnp.mean(nnx.merge(graphdef, params)(INPUTS) ** 2, axis=0)
    before = model.kernel[...].copy()
    for step in range(2):
        _, grads = optax_mtl.value_and_task_grads(squares)(params)
        optimizer.update(model, grads)
        changed = jnp.any(model.kernel[...] != before)
        assert changed == (step == 1) == optax_mtl.has_updated(optimizer.opt_state)
