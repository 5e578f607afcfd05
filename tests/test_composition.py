"""Methods inside Optax, Flax and orbax as users combine them."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx, serialization
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from tests.common import compiled, every_method, losses, params, stacked

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
TARGETS = jnp.asarray(RNG.normal(size=(16, 2)), jnp.float32)


def linear_losses(params, inputs, targets):
    return jnp.mean((inputs @ params["w"] + params["b"][None] - targets) ** 2, axis=0)


def linear_params():
    return {"w": jnp.full((5, 2), 0.1), "b": jnp.zeros(2)}


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(3e-3),
    "lars": optax.lars(1e-1),
    "adafactor": optax.adafactor(1e-2),
    "clipped_sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "skipping": optax.apply_if_finite(optax.adam(1e-2), 3),
    "accumulating": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_line_change_trains(name):
    tx = optax.chain(optax_mtl.cagrad(), OPTIMIZERS[name])
    params = linear_params()
    grads_fn = optax_mtl.value_and_task_grads(linear_losses)

    @jax.jit
    def step(params, state):
        losses, updates = grads_fn(params, INPUTS, TARGETS)
        updates, state = tx.update(updates, state, params, losses=losses)
        return optax.apply_updates(params, updates), state, losses

    state = tx.init(params)
    history = []
    for _ in range(30):
        params, state, losses = step(params, state)
        history.append(losses.sum())
    assert history[-1] < history[0]
    chex.assert_trees_all_equal_shapes(params, linear_params())


def test_skips_a_non_finite_step():
    tx = optax.chain(optax_mtl.upgrad(), optax.apply_if_finite(optax.adam(0.1), 3))
    state = tx.init(params())
    bad = stacked(2)
    bad["w"] = bad["w"].at[0, 0, 0].set(jnp.nan)
    update, after = jax.jit(tx.update)(bad, state, params())
    chex.assert_trees_all_equal(update, jax.tree.map(jnp.zeros_like, params()))
    chex.assert_trees_all_equal(after[1].inner_state, state[1].inner_state)


@pytest.mark.parametrize("c", [0.2, 0.8])
def test_hyperparameters_can_be_injected(c):
    method = optax.inject_hyperparams(optax_mtl.cagrad)(c=optax.constant_schedule(c))
    updates = stacked(3)
    actual, _ = jax.jit(method.update)(updates, method.init(params()))
    plain = optax_mtl.cagrad(c=c)
    expected, _ = plain.update(updates, plain.init(params()))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_per_task_clips_each_task():
    clip = optax_mtl.per_task(optax.clip_by_global_norm(1.0), 3)
    updates = stacked(3)
    clipped, _ = clip.update(updates, clip.init(params()), params())
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], updates)
        expected, _ = optax.clip_by_global_norm(1.0).update(one, optax.EmptyState())
        actual = jax.tree.map(lambda x, i=i: x[i], clipped)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_per_task_state_has_fixed_shapes():
    tx = optax.chain(optax_mtl.per_task(optax.ema(0.9), 3), optax_mtl.linear())
    state = tx.init(params())
    _, after = jax.jit(tx.update)(stacked(3), state, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(8, 1, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.trunk(x)))
        return jnp.concatenate([head(x) for head in self.heads], axis=1)


def shared(params):
    is_shared = lambda path, _: "heads" not in jax.tree_util.keystr(path)
    return jax.tree_util.tree_map_with_path(is_shared, params)


def labels(params):
    return jax.tree.map(lambda m: "shared" if m else "heads", shared(params))


def test_nnx_with_shared_trunk_and_heads():
    model = Net(nnx.Rngs(0))
    resolve = {"shared": optax_mtl.pcgrad(), "heads": optax.identity()}
    tx = optax.chain(optax.partition(resolve, labels), optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def losses_fn(params):
            model = nnx.merge(graph, params, rest, copy=True)
            losses = jnp.mean((model(INPUTS) - TARGETS) ** 2, axis=0)
            return losses, nnx.state(model, nnx.Not(nnx.Param))

        grads_fn = optax_mtl.value_and_task_grads(
            losses_fn, has_aux=True, shared=shared
        )
        (losses, rest), updates = grads_fn(params)
        nnx.update(model, rest)
        optimizer.update(model, updates, losses=losses)
        return losses

    history = [step(model, optimizer).sum() for _ in range(20)]
    assert history[-1] < history[0]
    assert jnp.any(model.norm.mean[...] != 0)  # Batch statistics came through.


def test_linen_train_state():
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), INPUTS)["params"]
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=variables,
        tx=optax.chain(optax_mtl.mgda(), optax.lion(3e-3)),
    )

    def losses_fn(params):
        return jnp.mean((model.apply({"params": params}, INPUTS) - TARGETS) ** 2, 0)

    @jax.jit
    def step(state):
        losses, updates = optax_mtl.value_and_task_grads(losses_fn)(state.params)
        return state.apply_gradients(grads=updates), losses.sum()

    state, first = step(state)
    for _ in range(20):
        state, last = step(state)
    assert last < first


@every_method
def test_state_survives_a_checkpoint(name, tmp_path):
    method = optax_mtl.get(name, 2)
    step = jax.jit(lambda u, s: method.update(u, s, params(), losses=losses(2)))
    _, state = step(stacked(2), jax.jit(method.init)(params()))
    if not jax.tree.leaves(state):
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(method.init, params())
        restored = checkpointer.restore(tmp_path / "state", target)
    expected = step(stacked(2, seed=1), state)
    actual = step(stacked(2, seed=1), restored)
    unwrap = optax.tree.unwrap_random_key_data
    chex.assert_trees_all_equal(unwrap(actual), unwrap(expected))


@every_method
def test_state_survives_every_serialiser(name):
    method, step = compiled(name)
    _, state = step(stacked(3), method.init(params()))
    leaves, structure = jax.tree.flatten(state)
    named = {str(i): np.asarray(x) for i, x in enumerate(leaves)}
    loaded = safetensors.numpy.load(safetensors.numpy.save(named))
    expected = step(stacked(3, seed=1), state)
    for copy in (
        serialization.from_bytes(state, serialization.to_bytes(state)),
        pickle.loads(pickle.dumps(state)),
        structure.unflatten([loaded[str(i)] for i in range(len(leaves))]),
    ):
        chex.assert_trees_all_equal(step(stacked(3, seed=1), copy), expected)


@pytest.mark.parametrize("name", ["pcgrad", "graddrop", "gradvac", "random_weights"])
def test_state_with_a_key_of_an_older_version_is_refused_with_a_remedy(name, tmp_path):
    method = optax_mtl.get(name, 2)
    state = method.init(params())
    old = state._replace(key=jax.random.wrap_key_data(state.key))
    update = lambda state: method.update(stacked(2), state, params())
    with pytest.raises(TypeError, match="unwrap_random_key_data"):
        update(old)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", old)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "old", old)
    converted = optax.tree.unwrap_random_key_data(restored)
    chex.assert_trees_all_equal(update(converted), update(state))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["pcgrad", "upgrad", "graddrop", "nash_mtl"])
def test_sharded_parameters_train_as_on_one_device(name, axis_type):
    """FSDP under jit: parameters sharded over eight devices, AdamW behind."""
    tx = optax.chain(optax_mtl.get(name, 2), optax.adamw(1e-2))
    grads_fn = optax_mtl.value_and_task_grads(linear_losses)
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(16, 2)), jnp.float32),
        "b": jnp.zeros(2),
    }
    inputs = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)

    def step(params, state, inputs, targets):
        losses, updates = grads_fn(params, inputs, targets)
        updates, state = tx.update(updates, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    def train(params, inputs):
        state = tx.init(params)
        compiled = jax.jit(step)
        for _ in range(3):
            params, state = compiled(params, state, inputs, TARGETS[:8])
        return params

    expected = jax.tree.map(np.asarray, train(params, inputs))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        sharded = {"w": put(params["w"], "data"), "b": put(params["b"])}
        if axis_type is AxisType.Explicit:
            grads_fn = optax_mtl.value_and_task_grads(explicit_losses)
        actual = train(sharded, put(inputs))
    assert axis_type is AxisType.Auto or actual["w"].sharding.spec[0] == "data"
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-4, atol=1e-5)


def explicit_losses(params, inputs, targets):
    """As linear_losses; an explicitly sharded contraction names its result."""
    outputs = jnp.dot(inputs, params["w"], out_sharding=P())
    return jnp.mean((outputs + params["b"][None] - targets) ** 2, axis=0)


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_data_parallel_trains_as_on_one_device(way):
    tx = optax.chain(optax_mtl.pcgrad(), optax.adamw(1e-2))
    grads_fn = optax_mtl.value_and_task_grads(linear_losses)

    def step(params, state, inputs, targets):
        _, updates = grads_fn(params, inputs, targets)
        updates = jax.lax.pmean(updates, "data")
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    def train(compiled, inputs, targets):
        params, state = linear_params(), tx.init(linear_params())
        for _ in range(3):
            params, state = compiled(params, state, inputs, targets)
        return params

    one_device = jax.vmap(step, in_axes=(None, None, 0, 0), out_axes=None,
                          axis_name="data")  # fmt: skip
    split = lambda x: x.reshape(8, 2, *x.shape[1:])
    expected = train(jax.jit(one_device), split(INPUTS), split(TARGETS))
    if way == "pmap":
        compiled = jax.pmap(
            step, axis_name="data", in_axes=(None, None, 0, 0), out_axes=None
        )
        actual = train(compiled, split(INPUTS), split(TARGETS))
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        def local(params, state, inputs, targets):
            # Gradients are taken on the device, and averaged before the method.
            params_here = jax.lax.pcast(params, "data", to="varying")
            _, updates = grads_fn(params_here, inputs, targets)
            updates = jax.lax.pmean(updates, "data")
            updates, state = tx.update(updates, state, params)
            return optax.apply_updates(params, updates), state

        specs = (P(), P(), P("data"), P("data"))
        compiled = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        )
        actual = train(compiled, INPUTS, TARGETS)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_reduce_scattered_gradients_shrink_with_the_devices():
    """Stacked gradients sharded over the data axis: memory falls with the devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    width, num_tasks = 256, 4
    spec = NamedSharding(mesh, P(None, "data"))

    def losses_fn(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2, axis=0).reshape(num_tasks, -1).sum(1)

    def step(w, x, scatter):
        _, updates = optax_mtl.value_and_task_grads(losses_fn, sequential=True)(w, x)
        if scatter:
            updates = jax.lax.with_sharding_constraint(updates, spec)
        method = optax_mtl.upgrad()
        return method.update(updates, method.init(w), w)[0]

    def memory(scatter):
        w = jax.ShapeDtypeStruct(
            (width, width), jnp.float32, sharding=NamedSharding(mesh, P())
        )
        x = jax.ShapeDtypeStruct(
            (64, width), jnp.float32, sharding=NamedSharding(mesh, P("data"))
        )
        compiled = jax.jit(step, static_argnums=2).lower(w, x, scatter).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    stacked_bytes = 4 * num_tasks * width**2
    assert memory(scatter=False) >= stacked_bytes
    assert memory(scatter=True) < memory(scatter=False) - stacked_bytes / 2
