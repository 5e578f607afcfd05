"""The calls for Flax NNX models: equal to ``nnx.value_and_grad`` in all but the tasks.

Expected values are those of ``nnx.value_and_grad`` of the sum of the losses.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mtl
import optax_mtl.nnx

T = 3
RNG = np.random.default_rng(0)
BATCH = (
    RNG.normal(size=(8, 4)).astype(np.float32),
    RNG.normal(size=(8, T)).astype(np.float32),
)
SHARED = {
    "filter": nnx.PathContains("trunk"),
    "function of path and variable": lambda path, variable: "trunk" in path,
    "function of the path": lambda path: path.startswith("trunk"),
    "dict": {"trunk": True, "heads": False},
    "state": nnx.State({"trunk": True, "heads": False}),
}


class Model(nnx.Module):
    """Statistics, dropout, low-rank parameters, and what appears in a pass."""

    def __init__(self, rngs):
        self.trunk = nnx.List(
            [
                nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs),
                nnx.BatchNorm(6, rngs=rngs),
                nnx.Dropout(0.3, rngs=rngs),
            ]
        )
        self.heads = nnx.Linear(6, T, rngs=rngs)

    def __call__(self, x):
        for layer in self.trunk:
            x = layer(x)
        self.mean_feature = nnx.Intermediate(x.mean())
        return self.heads(x)


def losses_fn(model, batch, rngs):
    noise = jax.random.normal(rngs.noise(), batch[0].shape)
    losses = jnp.mean((model(batch[0] + noise) - batch[1]) ** 2, axis=0)
    return losses, {"noise": noise}


def make():
    model, rngs = Model(nnx.Rngs(0)), nnx.Rngs(noise=1)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        del path
        variable[...] += 0.1  # Flax begins at 0, where half of the gradients vanish.
    return model, rngs, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def pure(*nodes):
    """The states of the nodes, as trees of plain arrays."""
    arrays = [nnx.to_pure_dict(nnx.state(node)) for node in nodes]
    return optax.tree.unwrap_random_key_data(arrays)


def assert_close(tree, other):
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, tree, other)


def trained(step, state=None):
    """Gradients of three steps, and all that the steps left behind."""
    model, rngs, optimizer = make()

    @nnx.jit
    def train_step(model, rngs, optimizer, state):
        value, grads, state = step(model, state, BATCH, rngs)
        optimizer.update(model, grads)
        return value, grads, state

    results = []
    state = getattr(step, "init", lambda _: None)(model)
    for _ in range(3):
        value, grads, state = train_step(model, rngs, optimizer, state)
        results.append((value, grads))
    assert model.trunk[2].rngs.count[...] == rngs.noise.count[...] == 3
    assert model.mean_feature[...] != 0
    return results, pure(model, rngs, optimizer)


@functools.cache
def expected():
    def sum_fn(*args):
        losses, aux = losses_fn(*args)
        return losses.sum(), (losses, aux)

    def step(model, state, *args):
        (_, value), grads = nnx.value_and_grad(sum_fn, has_aux=True)(model, *args)
        return value, grads, state

    return trained(step)


@pytest.mark.parametrize("shared", [None, "filter"])
@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_resolved_gradients_of_the_sum(mode, shared):
    step = optax_mtl.nnx.value_and_grad(
        losses_fn, optax_mtl.linear(), True, mode=mode, shared=SHARED.get(shared)
    )
    results = trained(step)
    assert_close(results, expected())
    assert jax.tree.structure(results) == jax.tree.structure(expected())


def test_task_gradients_sum_to_those_of_the_sum():
    task_grads = optax_mtl.nnx.value_and_task_grads(
        losses_fn, has_aux=True, shared=SHARED["filter"]
    )

    def step(model, state, *args):
        value, grads = task_grads(model, *args)
        trunk, heads = nnx.split_state(grads, SHARED["filter"], ...)
        total = jax.tree.map(lambda g: g.sum(axis=0), trunk)
        assert all(len(g) == T for g in jax.tree.leaves(trunk))
        return value, nnx.merge_state(total, heads), state

    assert_close(trained(step), expected())


@pytest.mark.parametrize("kind", SHARED)
def test_shared_by(kind):
    def shapes(shared):
        model, rngs, _ = make()
        fn = optax_mtl.nnx.value_and_task_grads(losses_fn, True, shared=shared)
        abstract = nnx.eval_shape(lambda m, r: fn(m, BATCH, r)[1], model, rngs)
        return jax.tree.map(jnp.shape, nnx.to_pure_dict(abstract))

    found = shapes(SHARED[kind])
    assert found["trunk"][0]["kernel"] == (T, 4, 6)
    assert found["heads"] == {"kernel": (6, T), "bias": (T,)}


@pytest.mark.parametrize(
    "wrt",
    [
        nnx.LoRAParam,
        nnx.PathContains("kernel"),
        nnx.All(nnx.Param, nnx.Not(nnx.PathContains("heads"))),
        (nnx.LoRAParam, nnx.PathContains("bias")),
        lambda path, _: path[0] == "heads",
    ],
    ids=["type", "path", "all", "any", "function"],
)
def test_filters(wrt):
    """With the optimizer of the same filter, which holds the model or does not."""
    sum_fn = lambda *args: losses_fn(*args)[0].sum()
    grad_fn = nnx.grad(sum_fn, argnums=nnx.DiffState(0, wrt))
    resolve = optax_mtl.nnx.value_and_grad(losses_fn, optax_mtl.linear(), True, wrt=wrt)

    @nnx.jit
    def both(model, rngs, optimizer, other, other_rngs, other_optimizer):
        grads = resolve(model, resolve.init(model), BATCH, rngs)[1]
        expected = grad_fn(other, BATCH, other_rngs)
        optimizer.update(model, grads)
        other_optimizer.update(expected)
        return grads, expected

    (model, rngs, _), (other, other_rngs, _) = make(), make()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
    other_optimizer = nnx.ModelAndOptimizer(other, optax.adam(1e-2), wrt=wrt)
    args = model, rngs, optimizer, other, other_rngs, other_optimizer
    grads, expected = both(*args)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    assert_close(grads, expected)
    assert_close(pure(model), pure(other))


def test_a_state_of_the_size_of_the_gradients():
    """It holds arrays, passes through ``nnx.jit``, and does not retrace."""
    traces = []
    method = optax_mtl.gcond(T)
    losses_fn = lambda model: jnp.mean((model(BATCH[0]) - BATCH[1]) ** 2, axis=0)
    resolve = optax_mtl.nnx.value_and_grad(losses_fn, method, mode="stacked")

    @nnx.jit
    def step(model, state):
        traces.append(None)
        return resolve(model, state)[1:]

    model = nnx.Linear(4, T, rngs=nnx.Rngs(0))
    state = resolve.init(model)
    is_variable = lambda x: isinstance(x, nnx.Variable)
    assert not any(map(is_variable, jax.tree.leaves(state, is_leaf=is_variable)))
    for _ in range(3):
        grads, state = step(model, state)
    assert len(traces) == 1
    assert grads["kernel"].shape == (4, T)


def test_costs_what_split_and_merge_by_hand_cost():
    """Floating-point operations of the compiled step, in every mode."""
    graphdef, state = nnx.split(make()[:2])
    method = optax_mtl.mgda()

    def by_hand(mode, state):
        model, rngs = nnx.merge(graphdef, state)
        graph, params, rest = nnx.split((model, rngs), nnx.Param, ...)

        def fn(params):
            model, rngs = nnx.merge(graph, params, rest, copy=True)
            losses, aux = losses_fn(model, BATCH, rngs)
            return losses, (aux, nnx.state((model, rngs), nnx.Not(nnx.Param)))

        resolve = optax_mtl.value_and_grad(fn, method, True, mode=mode)
        return resolve(params, resolve.init(params))

    def in_one_call(mode, state):
        model, rngs = nnx.merge(graphdef, state)
        resolve = optax_mtl.nnx.value_and_grad(losses_fn, method, True, mode=mode)
        results = resolve(model, resolve.init(model), BATCH, rngs)
        return *results, nnx.state((model, rngs), nnx.Not(nnx.Param))

    for mode in ("gram", "stacked"):
        cost = [
            jax.jit(functools.partial(fn, mode)).lower(state).cost_analysis()["flops"]
            for fn in (by_hand, in_one_call)
        ]
        assert cost[1] <= 1.02 * cost[0], cost


def test_auxiliary_data_may_hold_variables_and_a_model_may_be_seen_twice():
    def fn(model, batch, again):
        assert again is model.heads
        return jnp.mean((model(batch[0]) - batch[1]) ** 2, axis=0), again.bias

    model, *_ = make()
    (_, bias), grads = optax_mtl.nnx.value_and_task_grads(fn, has_aux=True)(
        model, BATCH, again=model.heads
    )
    assert bias is model.heads.bias
    assert grads["heads"]["kernel"].shape == (T, 6, T)


def test_another_model_as_an_argument_has_no_gradient_but_keeps_its_state():
    def distance(model, teacher, x):
        return jnp.mean((model(x) - teacher(x)) ** 2, axis=0)

    (model, *_), (teacher, *_) = make(), make()
    params = lambda model: pure(nnx.state(model, nnx.Param))
    before = params(teacher)
    losses, grads = optax_mtl.nnx.value_and_task_grads(distance)(
        model, teacher, BATCH[0]
    )
    assert set(grads) == {"trunk", "heads"} and losses.shape == (T,)
    assert teacher.trunk[1].mean[...].any() and teacher.trunk[2].rngs.count[...] == 1
    jax.tree.map(
        np.testing.assert_array_equal, before, pure(nnx.state(teacher, nnx.Param))
    )


class Scanned(nnx.Module):
    """Layers in one, each with a random key of its own: split, and rightly so."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Sequential(
                nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
            )

        self.layers = make(rngs)
        self.heads = nnx.Linear(4, T, rngs=rngs)

    def __call__(self, x):
        call = lambda layer, x: layer(x)
        scan = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.heads(scan(self.layers, x))


@pytest.mark.parametrize("graph", [True, False])
def test_scanned_and_rematerialised_layers(graph):
    """By the Gram matrix, in Flax's graph mode and in its tree mode."""
    losses_fn = lambda model: jnp.mean((model(BATCH[0]) - BATCH[1]) ** 2, axis=0)
    resolve = optax_mtl.nnx.value_and_grad(nnx.remat(losses_fn), optax_mtl.linear())
    grads_fn = lambda model: resolve(model, resolve.init(model))[1]
    sum_fn = lambda model: losses_fn(model).sum()
    model, other = Scanned(nnx.Rngs(0)), Scanned(nnx.Rngs(0))
    grads = nnx.jit(grads_fn, graph=graph)(model)
    expected = nnx.jit(nnx.grad(sum_fn))(other)
    assert_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected))
    assert_close(pure(model), pure(other))


def misuse():
    model, rngs, _ = make()
    split = nnx.Rngs(noise=jax.random.split(jax.random.key(0), T))
    of = optax_mtl.nnx.value_and_task_grads
    resolve = optax_mtl.nnx.value_and_grad(losses_fn, optax_mtl.linear(), True)
    no_scalars = lambda model, x: model.heads.kernel[...]
    total = lambda model, x: model.heads.kernel[...].sum()
    frozen = nnx.Param(jnp.zeros(2, jnp.int32))
    frozen_model = nnx.Dict(scale=frozen)
    return {
        "a State first": (
            lambda: of(losses_fn)(nnx.state(model), BATCH, rngs),
            TypeError,
            "the first argument is a State, expected the model, an nnx.Module",
        ),
        "a State for init": (
            lambda: resolve.init(nnx.state(model)),
            TypeError,
            "the first argument is a State",
        ),
        "nothing of the filter": (
            lambda: of(losses_fn, wrt=nnx.Cache)(model, BATCH, rngs),
            ValueError,
            "picks no variable of this Model, whose variables are BatchStat, LoRAParam,"
            " Param, RngCount, RngKey",
        ),
        "nothing of the filter for init": (
            lambda: optax_mtl.nnx.value_and_grad(
                losses_fn, optax_mtl.linear(), wrt="tag"
            ).init(model),
            ValueError,
            "wrt=tag picks no variable of this Model",
        ),
        "nothing shared": (
            lambda: of(losses_fn, True, shared=nnx.PathContains("body"))(
                model, BATCH, rngs
            ),
            ValueError,
            "shared marks none of the parameters, from 'heads/bias' to 'trunk/1/scale'",
        ),
        "split rngs": (
            lambda: of(losses_fn, True)(model, BATCH, split),
            ValueError,
            "The random key args[1]['noise']['key'] is split, shape (3,)",
        ),
        "no scalars": (
            lambda: of(no_scalars)(model, BATCH),
            ValueError,
            "one loss for each task, as a vector of shape (T,) or a dict of scalars,"
            " but returned shapes (6, 3)",
        ),
        "a sum": (lambda: of(total)(model, BATCH), ValueError, "returned shapes ()"),
        "integers": (
            lambda: of(lambda model: model.scale[...] * 1.0)(frozen_model),
            TypeError,
            "the parameter params['scale'] has dtype int32",
        ),
        "another state": (
            lambda: resolve(model, jnp.zeros(T), BATCH, rngs),
            ValueError,
            "the state is not the one of this method at these parameters",
        ),
        "no mode": (
            lambda: optax_mtl.nnx.value_and_grad(losses_fn, None, mode="fast"),
            ValueError,
            "mode is 'fast'; it should be 'auto', 'gram', 'leafwise' or 'stacked'",
        ),
    }


@pytest.mark.parametrize("name", misuse())
def test_misuse(name):
    call, kind, message = misuse()[name]
    with pytest.raises(kind) as info:
        call()
    text = "\n".join([str(info.value), *getattr(info.value, "__notes__", [])])
    assert message in text


def test_the_library_itself_does_not_need_flax():
    code = "import optax_mtl, sys; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def own_loss_fn(model, task, x, y, rngs):
    losses, aux = losses_fn(model, (x, y), rngs)
    return losses[task], aux


@pytest.mark.parametrize("mode", [None, "leafwise", "stacked"])
def test_own_data_of_one_batch_as_losses_of_that_batch(mode):
    """Also the statistics and counts left behind; measured in a part."""
    tasks = np.arange(T)
    repeated = [np.broadcast_to(x, (T, *x.shape)) for x in BATCH]

    def run(own):
        model, rngs, _ = make()
        options = {"shared": SHARED["filter"], "own_data": own}
        loss_fn = own_loss_fn if own else losses_fn
        args = (tasks, *repeated) if own else (BATCH,)
        if mode is None:
            fn = optax_mtl.nnx.value_and_task_grads(loss_fn, True, **options)
            step = lambda model, rngs: fn(model, *args, rngs=rngs)
        else:
            options |= {"mode": mode, "measure": nnx.PathContains("lora_a")}
            fn = optax_mtl.nnx.value_and_grad(
                loss_fn, optax_mtl.mgda(), True, **options
            )
            step = lambda model, rngs: fn(model, fn.init(model), *args, rngs=rngs)[:2]
        (losses, aux), grads = nnx.jit(step)(model, rngs)
        noise = aux["noise"][0] if own else aux["noise"]
        return losses, noise, nnx.to_pure_dict(grads), pure(model, rngs)

    assert_close(run(True), run(False))


def test_statistics_of_tasks_are_averaged():
    model = nnx.BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(0))
    x = RNG.normal(size=(T, 8, 2)).astype(np.float32)
    loss_fn = lambda model, x: jnp.sum(model(x) ** 3)
    optax_mtl.nnx.value_and_task_grads(loss_fn, own_data=True)(model, x)
    assert_close(model.mean[...], x.mean(axis=(0, 1)))
    assert_close(model.var[...], x.var(axis=1).mean(axis=0))
