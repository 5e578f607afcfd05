"""Ways to get task gradients agree with each other, and cost what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from tests.common import compiled_fast, flops, temporary_memory

T = 4
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
TARGETS = jnp.asarray(RNG.normal(size=(16, T)), jnp.float32)

BY_GRAM = [n for n, row in optax_mtl.METHODS.items() if "gradients" not in row.reads]
BY_LOSSES = [n for n in BY_GRAM if "gram" not in optax_mtl.METHODS[n].reads]
ELEMENTWISE = [n for n in optax_mtl.METHODS if n not in BY_GRAM]


def make_params(width=32, num_tasks=T, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, dtype)
    return {
        "trunk": {"w": draw(8, width), "v": draw(width, width)},
        "heads": draw(width, num_tasks),
    }


def trunk_fn(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["trunk"]["w"])
    return jnp.tanh(hidden @ params["trunk"]["v"])


def heads_fn(params, features, inputs, targets):
    return jnp.mean((features @ params["heads"] - targets) ** 2, axis=0)


def losses_fn(params, inputs, targets):
    return heads_fn(params, trunk_fn(params, inputs, targets), inputs, targets)


def named_losses_fn(params, inputs, targets):
    losses = losses_fn(params, inputs, targets)
    return {name: losses[i] for i, name in enumerate("dbca")}


def shared(params):
    return {"trunk": True, "heads": False}


def assert_close(tree, other, tolerance=1e-5):
    """Compares trees by the norm of their difference, relative to the second."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), tree, other)
    difference = optax.tree.norm(optax.tree.sub(tree, other))
    assert difference <= tolerance * optax.tree.norm(other)


MODES = ("gram", "leafwise", "stacked")


def in_modes(
    losses_fn,
    method,
    params,
    *args,
    modes=MODES,
    steps=1,
    compiled=compiled_fast,
    **kwargs,
):
    """Gradients and state after some steps in each mode."""

    @compiled
    def run(params, *args):
        out = []
        for mode in modes:
            fn = optax_mtl.value_and_grad(losses_fn, method, mode=mode, **kwargs)
            step = lambda state, _, fn=fn: fn(params, state, *args)[:0:-1]
            state = method.init(params)
            state, grads = jax.lax.scan(step, state, length=steps)
            grads = jax.tree.map(lambda x: x[-1], grads)
            out.append((grads, state))
        return out

    return run(params, *args)


@pytest.mark.parametrize("sequential", [False, True])
def test_task_grads_are_those_of_each_loss(sequential):
    params = make_params()
    fn = optax_mtl.value_and_task_grads(losses_fn, sequential=sequential)
    losses, updates = jax.jit(fn)(params, INPUTS, TARGETS)
    for i in range(T):
        one = lambda params, i=i: losses_fn(params, INPUTS, TARGETS)[i]
        loss, grads = jax.value_and_grad(one)(params)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-6)
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), grads)


def test_named_losses_are_in_the_order_of_their_names():
    params = make_params()
    fn = optax_mtl.value_and_task_grads(named_losses_fn)
    losses, updates = fn(params, INPUTS, TARGETS)
    _, by_index = optax_mtl.value_and_task_grads(losses_fn)(params, INPUTS, TARGETS)
    assert list(losses) == ["a", "b", "c", "d"]
    order = jnp.array([3, 1, 2, 0])
    assert_close(updates, jax.tree.map(lambda x: x[order], by_index))


@pytest.mark.parametrize("losses_fn", [losses_fn, named_losses_fn])
@pytest.mark.parametrize("compiled", [jax.jit, compiled_fast])
def test_heads_get_the_gradient_of_the_sum(compiled, losses_fn):
    params = make_params()
    of_sum = jax.grad(
        lambda p: sum(jax.tree.leaves(losses_fn(p, INPUTS, TARGETS))).sum()
    )(params)
    fn = optax_mtl.value_and_task_grads(losses_fn, shared=shared)
    _, updates = fn(params, INPUTS, TARGETS)
    assert updates["trunk"]["w"].shape == (T, 8, 32)
    assert_close(updates["heads"], of_sum["heads"])
    arguments = losses_fn, optax_mtl.mgda(), params, INPUTS, TARGETS
    out = in_modes(*arguments, compiled=compiled, shared=shared)
    for grads, _ in out:
        assert_close(grads["heads"], of_sum["heads"])
        assert_close(grads, out[0][0], 1e-4)


@pytest.mark.parametrize("name", BY_GRAM)
def test_gram_suffices(name):
    method = optax_mtl.get(name, T)
    modes = "gram", "stacked"  # Leafwise differs from the former in the matrix alone.
    by_gram, by_stack = in_modes(
        losses_fn, method, make_params(), INPUTS, TARGETS, modes=modes, steps=2
    )
    assert_close(by_gram[0], by_stack[0], 1e-4)
    assert jax.tree.structure(by_gram[1]) == jax.tree.structure(by_stack[1])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_methods_take_the_stacked_way_alone(name):
    method = optax_mtl.get(name, T)
    params = make_params()
    for mode in "gram", "leafwise":
        fn = optax_mtl.value_and_grad(losses_fn, method, mode=mode)
        with pytest.raises(TypeError, match="value_and_task_grads"):
            jax.eval_shape(fn, params, method.init(params), INPUTS, TARGETS)
    for mode in "auto", "stacked":
        fn = optax_mtl.value_and_grad(losses_fn, method, mode=mode)
        _, grads, _ = jax.eval_shape(fn, params, method.init(params), INPUTS, TARGETS)
        same_shape = lambda g, p: np.testing.assert_equal(g.shape, p.shape)
        jax.tree.map(same_shape, grads, params)


@pytest.mark.parametrize("name", BY_LOSSES)
def test_methods_without_gram_take_one_backward_pass(name):
    params = make_params(width=64)
    method = optax_mtl.get(name, T)
    fn = optax_mtl.value_and_grad(losses_fn, method)
    cost = flops(fn, params, method.init(params), INPUTS, TARGETS)
    of_sum = jax.value_and_grad(lambda *args: losses_fn(*args).sum())
    assert cost <= 1.05 * flops(of_sum, params, INPUTS, TARGETS)


def test_memory_does_not_grow_with_the_number_of_tasks():
    method = optax_mtl.cagrad()
    memory = {}
    for num_tasks in (4, 32):
        params = make_params(width=256, num_tasks=num_tasks)
        batch = jnp.ones((256, 8)), jnp.zeros((256, num_tasks))
        fn = optax_mtl.value_and_grad(losses_fn, method, mode="gram", shared=shared)
        memory[num_tasks] = temporary_memory(fn, params, (), *batch)
    of_sum = jax.value_and_grad(lambda *args: losses_fn(*args).sum())
    plain = temporary_memory(of_sum, params, *batch)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert memory[32] <= 1.1 * memory[4]
    assert memory[32] <= plain + 3 * size


def test_leafwise_needs_less_memory_than_stacked_gradients(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # Nothing here is sharded.
    params = [jnp.ones((256, 256))] * 8

    def deep_losses(params, inputs):
        for w in params:
            inputs = jnp.tanh(inputs @ w)
        return {str(i): jnp.mean(inputs[i] ** 2) for i in range(T)}

    def memory(mode):
        fn = optax_mtl.value_and_grad(deep_losses, optax_mtl.upgrad(), mode=mode)
        return temporary_memory(fn, params, (), jnp.ones((16, 256)))

    assert memory("leafwise") <= 0.6 * memory("stacked")


def test_memory_of_heads_does_not_grow_with_the_number_of_tasks():
    """Beyond the plain sum, heads cost no more for many tasks than for few."""

    def decoder_losses(params, inputs, targets):
        hidden = jnp.tanh(inputs @ params["trunk"])
        out = jnp.tanh(hidden @ params["heads"]).reshape(16, targets.shape[1], -1)
        return jnp.mean((out - targets[..., None]) ** 2, axis=(0, 2))

    params = {"trunk": jnp.ones((8, 8)), "heads": jnp.ones((8, 2**16))}
    mask = {"trunk": True, "heads": False}
    of_sum = jax.value_and_grad(lambda *args: decoder_losses(*args).sum())
    task_grads = optax_mtl.value_and_task_grads(
        decoder_losses, shared=mask, sequential=True
    )
    resolve = optax_mtl.value_and_grad(
        decoder_losses, optax_mtl.cagrad(), mode="gram", shared=mask
    )
    for fn in (task_grads, lambda params, *args: resolve(params, (), *args)):
        extra = [
            temporary_memory(fn, params, INPUTS, jnp.ones((16, num_tasks)))
            - temporary_memory(of_sum, params, INPUTS, jnp.ones((16, num_tasks)))
            for num_tasks in (2, 16)
        ]
        assert extra[1] - extra[0] < params["heads"].nbytes


def test_auxiliary_data_is_computed_once():
    calls = []

    def with_aux(params, inputs, targets):
        calls.append(1)
        jax.debug.callback(lambda: calls.append(2))
        losses = losses_fn(params, inputs, targets)
        return losses, {"total": losses.sum()}

    method = optax_mtl.cagrad()
    params = make_params()
    for fn in (
        optax_mtl.value_and_task_grads(with_aux, has_aux=True),
        lambda *args: optax_mtl.value_and_grad(with_aux, method, has_aux=True)(
            args[0], (), *args[1:]
        ),
    ):
        calls.clear()
        (losses, aux), *_ = jax.jit(fn)(params, INPUTS, TARGETS)
        jax.effects_barrier()
        assert calls == [1, 2]
        np.testing.assert_allclose(aux["total"], losses.sum(), rtol=1e-6)


def test_checkpointed_and_scanned_models():
    @jax.checkpoint
    def block(hidden, w):
        return jnp.tanh(hidden @ w)

    def deep_losses(params, inputs, targets):
        hidden = jnp.tanh(inputs @ params["trunk"]["w"])
        layers = jnp.stack([params["trunk"]["v"]] * 3)
        hidden, _ = jax.lax.scan(lambda h, w: (block(h, w), None), hidden, layers)
        return jnp.mean((hidden @ params["heads"] - targets) ** 2, axis=0)

    method = optax_mtl.upgrad()
    out = in_modes(deep_losses, method, make_params(), INPUTS, TARGETS)
    for grads, _ in out[1:]:
        assert_close(grads, out[0][0], 1e-4)


def test_bfloat16_parameters():
    def low_precision(params, inputs, targets):
        features = trunk_fn(params, inputs.astype(jnp.bfloat16), targets)
        error = (features @ params["heads"]).astype(jnp.float32) - targets
        return jnp.mean(error**2, axis=0)

    params = make_params(dtype=jnp.bfloat16)
    out = in_modes(low_precision, optax_mtl.cagrad(), params, INPUTS, TARGETS)
    for grads, _ in out:
        assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"bfloat16"}
    first, *others = (optax.tree.cast(grads, jnp.float32) for grads, _ in out)
    for grads in others:
        # The unit roundoff of bfloat16 is 4e-3; all ways round every gradient.
        assert_close(grads, first, 2e-2)


def test_nonfinite_gradients_show_as_in_the_stacked_way():
    targets = TARGETS.at[0, 1].set(jnp.nan)
    for name in ("cagrad", "linear"):
        method = optax_mtl.get(name, T)
        for grads, _ in in_modes(losses_fn, method, make_params(), INPUTS, targets):
            assert not jnp.isfinite(grads["trunk"]["w"]).any()


def masked_losses_fn(params, inputs, targets, mask):
    """Averages over the labels that are there; exactly 0 for a task with none."""
    error = (trunk_fn(params, inputs, targets) @ params["heads"] - targets) ** 2
    return jnp.sum(error * mask, axis=0) / jnp.maximum(mask.sum(axis=0), 1)


@pytest.mark.parametrize("name", ["cagrad", "nash_mtl", "gradvac", "dwa", "gls"])
@pytest.mark.parametrize("mode", MODES)
def test_a_task_without_labels_is_absent(name, mode):
    """The others get what they get alone, and its statistics do not move."""
    params, method = make_params(), optax_mtl.get(name, T)
    fn = compiled_fast(optax_mtl.value_and_grad(masked_losses_fn, method, mode=mode))
    everywhere = jnp.ones((16, T)).at[:5, 2].set(0)
    state = method.init(params)
    for _ in range(2):
        _, _, state = fn(params, state, INPUTS, TARGETS, everywhere)
    missing = everywhere.at[:, 1].set(0)
    losses, grads, new_state = fn(params, state, INPUTS, TARGETS, missing)
    _, replaced, _ = fn(params, state, INPUTS, TARGETS.at[:, 1].set(7), missing)
    assert losses[1] == 0 and not jnp.any(grads["heads"][:, 1])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((grads, new_state)))
    assert_close(grads, replaced, 0)  # What the labels would have been is no matter.

    def statistics(state, task):
        """Entries of the state that belong to the task, by their axes of size T."""
        leaves = [x for x in jax.tree.leaves(state) if T in x.shape]
        return [jnp.moveaxis(x, x.shape.index(T), 0)[task] for x in leaves]

    if name in ("gradvac", "dwa"):
        before, after = statistics(state, 1), statistics(new_state, 1)
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_at_features_is_the_plain_gradient_for_the_sum():
    params = make_params()
    of_sum = jax.grad(lambda p: losses_fn(p, INPUTS, TARGETS).sum())(params)
    fn = optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, optax_mtl.linear())
    losses, grads, _ = fn(params, (), INPUTS, TARGETS)
    assert_close(grads, of_sum)
    np.testing.assert_allclose(losses, losses_fn(params, INPUTS, TARGETS), rtol=1e-6)


@pytest.mark.parametrize("name", ["mgda", "trimmed_mean"])
@pytest.mark.parametrize("sum_batch", [False, True])
def test_at_features_resolves_gradients_of_the_features(name, sum_batch):
    params, method = make_params(), optax_mtl.get(name, T)
    fn = optax_mtl.value_and_grad_at_features(
        trunk_fn, heads_fn, method, sum_batch=sum_batch
    )
    features, pull_back = jax.vjp(lambda p: trunk_fn(p, INPUTS, TARGETS), params)
    if sum_batch and name in ELEMENTWISE:
        with pytest.raises(TypeError, match="value_and_task_grads"):
            fn(params, method.init(features), INPUTS, TARGETS)
        return
    _, grads, _ = fn(params, method.init(features), INPUTS, TARGETS)
    jacobian = jax.jacrev(lambda z: heads_fn(params, z, INPUTS, TARGETS))(features)
    if sum_batch:
        # The identity gives the weights of a method that reads inner products.
        summed = jacobian.sum(axis=1)
        weights = jnp.linalg.lstsq(summed.T, method.update(summed, ())[0])[0]
        resolved = jnp.tensordot(weights, jacobian, axes=1)
    else:
        resolved = method.update(jacobian, method.init(features))[0]
    assert_close(grads["trunk"], pull_back(resolved)[0]["trunk"], 1e-4)
    of_sum = jax.grad(lambda p: losses_fn(p, INPUTS, TARGETS).sum())(params)
    assert_close(grads["heads"], of_sum["heads"])


def test_at_features_returns_auxiliary_data_of_both():
    with_aux = lambda fn, name: lambda *args: (fn(*args), {name: jnp.ones(2)})
    fn = optax_mtl.value_and_grad_at_features(
        with_aux(trunk_fn, "trunk"),
        with_aux(heads_fn, "heads"),
        optax_mtl.mgda(),
        has_aux=True,
    )
    (losses, aux), _, _ = fn(make_params(), (), INPUTS, TARGETS)
    assert losses.shape == (T,)
    assert [list(x) for x in aux] == [["trunk"], ["heads"]]


class Model(nnx.Module):
    """Batch statistics, dropout and a head for each task."""

    def __init__(self, rngs):
        self.trunk = nnx.Sequential(
            nnx.Linear(8, 16, rngs=rngs),
            nnx.BatchNorm(16, rngs=rngs),
            nnx.tanh,
            nnx.Dropout(0.2, rngs=rngs),
        )
        self.heads = nnx.List([nnx.Linear(16, 1, rngs=rngs) for _ in range(T)])

    def __call__(self, inputs):
        features = self.trunk(inputs)
        return jnp.concatenate([head(features) for head in self.heads], axis=1)


def is_trunk(path, param):
    return "trunk" in jax.tree_util.keystr(path)


@pytest.mark.parametrize("mode", ["gram", "stacked"])
def test_nnx_with_heads(mode):
    model = Model(nnx.Rngs(0))
    tx = optax.adam(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    method = optax_mtl.cagrad()
    graphdef = nnx.split(model)[0]

    def losses_of(params, rest, inputs, targets):
        model = nnx.merge(graphdef, params, rest, copy=True)
        losses = jnp.mean((model(inputs) - targets) ** 2, axis=0)
        return losses, nnx.state(model, nnx.Not(nnx.Param))

    fn = optax_mtl.value_and_grad(
        losses_of,
        method,
        has_aux=True,
        mode=mode,
        shared=lambda params: jax.tree.map_with_path(is_trunk, params),
    )

    @nnx.jit
    def train_step(model, optimizer, state):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        (losses, rest), grads, state = fn(params, state, rest, INPUTS, TARGETS)
        nnx.update(model, rest)
        optimizer.update(model, grads)
        return losses, state

    state = method.init(nnx.state(model, nnx.Param))
    history = []
    for _ in range(30):
        losses, state = train_step(model, optimizer, state)
        history.append(losses.sum())
    assert history[-1] < 0.7 * history[0]
    assert model.trunk.layers[3].rngs.count[...] == 30  # Once a step.
    assert jnp.any(model.trunk.layers[1].mean[...] != 0)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        features = nn.tanh(nn.Dense(16, name="trunk")(inputs))
        heads = [nn.Dense(1, name=f"head_{i}")(features) for i in range(T)]
        return jnp.concatenate(heads, axis=1)


class TrainState(train_state.TrainState):
    """Hands extra arguments, such as losses, to the optimizer."""

    def apply_gradients(self, *, grads, **extra_args):
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, **extra_args
        )
        params = optax_mtl.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


def test_linen_with_heads_and_a_method_that_reads_losses():
    model = LinenModel()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    mask = {name: name == "trunk" for name in params}
    labels = {name: "trunk" if name == "trunk" else "heads" for name in params}
    method = optax.partition(
        {"trunk": optax_mtl.dwa(T, window=1), "heads": optax.identity()}, labels
    )
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.chain(method, optax.adam(1e-2))
    )

    def losses_of(params):
        predictions = model.apply({"params": params}, INPUTS)
        return jnp.mean((predictions - TARGETS) ** 2, axis=0)

    @jax.jit
    def train_step(state):
        fn = optax_mtl.value_and_task_grads(losses_of, shared=mask)
        losses, updates = fn(state.params)
        return state.apply_gradients(grads=updates, losses=losses), losses

    history = []
    for _ in range(30):
        state, losses = train_step(state)
        history.append(losses.sum())
    assert history[-1] < 0.7 * history[0]


@pytest.fixture(scope="module")
def on_one_device():
    """Parameters, and the gradient that CAGrad makes of all examples."""
    params = make_params()
    resolve = compiled_fast(optax_mtl.value_and_grad(losses_fn, optax_mtl.cagrad()))
    return params, jax.device_get(resolve(params, (), INPUTS, TARGETS)[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sharded_params", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_sharded_jit(axis_type, sharded_params, mode, on_one_device):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    place = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    if sharded_params and axis_type == AxisType.Explicit:
        losses_of = jax.sharding.auto_axes(losses_fn, out_sharding=P())
    else:
        losses_of = losses_fn
    resolve = optax_mtl.value_and_grad(losses_of, optax_mtl.cagrad(), mode=mode)
    params, expected = on_one_device
    spec = lambda p: P(*("data" if n % 8 == 0 else None for n in p.shape[:1]))
    sharded = {
        "params": jax.tree.map(
            lambda p: place(spec(p) if sharded_params else P())(p), params
        ),
        "batch": [place(P("data"))(x) for x in (INPUTS, TARGETS)],
    }
    with jax.set_mesh(mesh):
        step = compiled_fast(resolve)
        _, grads, _ = step(sharded["params"], (), *sharded["batch"])
    assert_close(jax.device_get(grads), expected, 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_shard_map_with_losses_averaged_inside(mode, on_one_device):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    average = lambda *args: jax.lax.pmean(losses_fn(*args), "data")
    resolve = optax_mtl.value_and_grad(average, optax_mtl.cagrad(), mode=mode)
    sharded = jax.shard_map(
        lambda params, *batch: resolve(params, (), *batch)[1],
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    params, expected = on_one_device
    grads = compiled_fast(sharded)(params, INPUTS, TARGETS)
    assert_close(jax.device_get(grads), expected, 1e-4)


@jax.custom_vjp
def reverse_only(x):
    return jnp.tanh(x)


reverse_only.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),)
)


def test_models_with_a_custom_vjp():
    custom = lambda *args: losses_fn(*args) + 0 * reverse_only(losses_fn(*args))
    params = make_params()
    resolve = lambda method, **kwargs: optax_mtl.value_and_grad(
        custom, method, **kwargs
    )(params, method.init(params), INPUTS, TARGETS)
    with pytest.raises(TypeError, match="mode='leafwise'"):
        resolve(optax_mtl.cagrad(), mode="gram")
    resolve(optax_mtl.dwa(T), mode="gram")  # Nothing is pushed forward.
    _, auto, _ = resolve(optax_mtl.cagrad())
    _, leafwise, _ = resolve(optax_mtl.cagrad(), mode="leafwise")
    _, stacked, _ = resolve(optax_mtl.cagrad(), mode="stacked")
    assert_close(leafwise, stacked, 1e-4)
    assert_close(auto, stacked, 1e-4)


BAD_LOSSES = {
    "scalar": lambda p: p["w"].sum(),
    "matrix": lambda p: jnp.ones((2, 2)) * p["w"].sum(),
    "dict of vectors": lambda p: {"a": p["w"], "b": p["w"]},
    "nothing": lambda p: {},
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_losses_of_another_shape_are_refused(name):
    params = {"w": jnp.ones(2)}
    bad, method = BAD_LOSSES[name], optax_mtl.linear()
    for fn in (
        optax_mtl.value_and_task_grads(bad),
        lambda p: optax_mtl.value_and_grad(bad, method)(p, ()),
        lambda p: optax_mtl.value_and_grad_at_features(
            lambda p: p["w"], lambda p, z: bad(p), method
        )(p, ()),
        lambda p: optax_mtl.accumulate_task_grads(bad, 1)(p),
    ):
        with pytest.raises(ValueError, match="one loss for each task"):
            jax.eval_shape(fn, params)


def test_other_bad_input_is_refused_with_a_remedy():
    params = {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}
    vector_fn = lambda p: p["w"]
    for make in (
        lambda: optax_mtl.value_and_task_grads(vector_fn)(params),
        lambda: optax_mtl.value_and_grad(vector_fn, optax_mtl.mean())(params, ()),
        lambda: optax_mtl.accumulate_task_grads(vector_fn, 1)(params),
    ):
        with pytest.raises(TypeError, match=r"params\['n'\].*another argument"):
            jax.eval_shape(make)
    method = optax_mtl.dwa(num_tasks=3)
    fn = optax_mtl.value_and_grad(vector_fn, method)
    with pytest.raises(ValueError, match="num_tasks=2"):
        fn({"w": jnp.ones(2)}, method.init(params))
    with pytest.raises(ValueError, match="'auto', 'gram', 'leafwise' or 'stacked'"):
        optax_mtl.value_and_grad(vector_fn, method, mode="exact")
    fn = optax_mtl.value_and_grad(vector_fn, optax.identity(), mode="gram")
    with pytest.raises(TypeError, match="no method that consumes"):
        fn({"w": jnp.ones(2)}, ())


def test_features_without_a_gradient_pass_by_the_method():
    """A mask and a number, in a tree: the same as closed over by the heads."""
    mask = INPUTS[:, 0] > 0
    trunk = lambda params, x: jnp.tanh(x @ params["trunk"])

    def heads(params, z, keep, scale):
        kept = jnp.where(keep[:, None], z, 0)
        return scale * jnp.mean((kept @ params["heads"]) ** 2, axis=0)

    rng = np.random.default_rng(0)
    params = {
        "trunk": rng.normal(size=(INPUTS.shape[1], 5)).astype(np.float32),
        "heads": rng.normal(size=(5, 3)).astype(np.float32),
    }
    for method, sum_batch in ((optax_mtl.mgda(), True), (optax_mtl.sam_gs(3), False)):
        passed = optax_mtl.value_and_grad_at_features(
            lambda params, x: {"z": trunk(params, x), "keep": mask, "scale": 2},
            lambda params, z, x: heads(params, z["z"], z["keep"], z["scale"]),
            method,
            sum_batch=sum_batch,
        )
        closed = optax_mtl.value_and_grad_at_features(
            trunk,
            lambda params, z, x: heads(params, z, mask, 2),
            method,
            sum_batch=sum_batch,
        )
        found, expected = (
            jax.jit(fn)(params, fn.init(params, INPUTS), INPUTS)[:2]
            for fn in (passed, closed)
        )
        assert_close(found, expected)
    with pytest.raises(TypeError, match="should return floating-point features, but"):
        optax_mtl.value_and_grad_at_features(
            lambda params, x: mask, heads, optax_mtl.mgda()
        ).init(params, INPUTS)
