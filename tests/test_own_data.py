"""Tasks with data of their own: one loss, and arguments with a task axis."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from optax_mtl import accumulate_task_grads, value_and_grad, value_and_task_grads
from tests.common import compiled_fast, flops, temporary_memory

T, N, D = 4, 6, 3
RNG = np.random.default_rng(0)
PARAMS = {
    "trunk": RNG.normal(size=(D, D)).astype(np.float32),
    "heads": RNG.normal(size=(T, D)).astype(np.float32),
}
X = RNG.normal(size=(T, N, D)).astype(np.float32)
Y = RNG.normal(size=(T, N)).astype(np.float32)
# Tasks with fewer examples, and one without any.
COUNTS = np.array([6, 4, 0, 1])
MASK = (np.arange(N) < COUNTS[:, None]).astype(np.float32)
TASKS = np.arange(T)
SHARED = {"trunk": True, "heads": False}


def loss_fn(params, task, x, y, mask, scale=1.0):
    error = x @ params["trunk"] @ params["heads"][task] - y
    return scale * jnp.sum(error**2 * mask) / jnp.maximum(mask.sum(), 1)


def with_aux(*args, **kwargs):
    loss = loss_fn(*args, **kwargs)
    return loss, {"twice": 2 * loss}


def losses_fn(params, *args, **kwargs):
    """The same as it would be written without own_data."""
    each = [jax.tree.map(lambda x, i=i: x[i], args) for i in range(T)]
    return jnp.stack([loss_fn(params, *of_one, **kwargs) for of_one in each])


def by_hand():
    """Losses, gradients of the trunk, gradient of the heads; NumPy in float64."""
    w, heads = (PARAMS[k].astype(np.float64) for k in ("trunk", "heads"))
    residual = (np.einsum("tnd,de,te->tn", X.astype(float), w, heads) - Y) * MASK
    count = np.maximum(COUNTS, 1)
    losses = np.sum(residual**2, axis=1) / count
    slope = 2 * residual / count[:, None]
    trunk = np.einsum("tn,tnd,te->tde", slope, X, heads)
    return losses, trunk, np.einsum("tn,tnd,de->te", slope, X, w)


ARGS = (TASKS, X, Y, MASK)


def assert_close(actual, expected, rtol=1e-4):
    compare = partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5)
    jax.tree.map(compare, actual, expected)


@cache
def stacked(**options):
    fn = value_and_task_grads(loss_fn, own_data=True, shared=SHARED, **options)
    return compiled_fast(fn)(PARAMS, *ARGS)


@pytest.mark.parametrize("sequential", [False, True])
def test_gradients_by_hand(sequential):
    losses, trunk, heads = by_hand()
    expected = losses, {"trunk": trunk, "heads": heads}
    assert_close(stacked(sequential=sequential), expected)


def test_auxiliary_data_keywords_and_no_heads():
    fn = value_and_task_grads(with_aux, True, own_data=True)
    (losses, aux), updates = compiled_fast(fn)(PARAMS, *ARGS, scale=2.0)
    expected, trunk, heads = by_hand()
    assert_close(losses, 2 * expected)
    assert_close(aux["twice"], 4 * expected)
    assert_close(updates["trunk"], 2 * trunk)
    assert_close(updates["heads"], 2 * np.eye(T)[:, :, None] * heads)


METHODS = {
    "mgda": optax_mtl.mgda(),
    "linear": optax_mtl.linear(weights=[1.0, 2.0, 3.0, 4.0]),
    "gls": optax_mtl.gls(),
    "zero_nonfinite": optax_mtl.zero_nonfinite(optax_mtl.upgrad()),
    "nash_mtl, later Adam": optax.chain(optax_mtl.nash_mtl(), optax.adam(0.1)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("has_aux", [False, True])
def test_resolved_in_every_mode_as_without_own_data(name, has_aux):
    options = {"shared": SHARED, "optimizer": optax.sgd(0.1)}
    plain = value_and_grad(losses_fn, METHODS[name], **options, mode="stacked")
    state = plain.init(PARAMS)
    expected = compiled_fast(plain)(PARAMS, state, *ARGS)
    loss = with_aux if has_aux else loss_fn
    for mode in ("auto", "gram", "leafwise", "stacked"):
        fn = value_and_grad(
            loss, METHODS[name], has_aux, **options, mode=mode, own_data=True
        )
        value, *others = compiled_fast(fn)(PARAMS, state, *ARGS)
        if has_aux:
            value, aux = value
            assert_close(aux["twice"], 2 * value)
        assert_close((value, *others), expected)


def test_method_that_reads_gradients():
    """In the mode that is chosen, as in the stacked one; few or many tasks."""
    for keep in (slice(None), np.arange(8) % T):
        args = [x[keep] for x in ARGS]
        auto, stacked = (
            value_and_grad(loss_fn, optax_mtl.trimmed_mean(), own_data=True, mode=mode)
            for mode in ("auto", "stacked")
        )
        run = lambda *args, fns=(auto, stacked): [fn(PARAMS, (), *args) for fn in fns]
        assert_close(*compiled_fast(run)(*args))


def test_task_without_examples_is_absent():
    """As if it were not there; the heads of the others are the same."""
    present = COUNTS > 0
    others = [x[present] for x in ARGS]
    fn = value_and_grad(loss_fn, optax_mtl.mgda(), own_data=True, shared=SHARED)
    run = lambda args: compiled_fast(fn)(PARAMS, fn.init(PARAMS), *args)
    losses, grads, _ = run(ARGS)
    assert losses[2] == 0 and np.all(grads["heads"][2] == 0)
    assert_close(grads, run(others)[1])


@pytest.mark.parametrize("mode", ["leafwise", "stacked"])
def test_task_that_is_not_finite_harms_no_other(mode):
    method = optax_mtl.zero_nonfinite(optax_mtl.mgda())
    fn = value_and_grad(loss_fn, method, own_data=True, shared=SHARED, mode=mode)
    run = compiled_fast(fn)
    y = np.where(TASKS[:, None] == 1, np.inf, Y)
    mask = np.where(TASKS[:, None] == 1, 0, MASK)
    broken = run(PARAMS, fn.init(PARAMS), TASKS, X, y, MASK)
    absent = run(PARAMS, fn.init(PARAMS), TASKS, X, Y, mask)
    assert_close(broken[1]["trunk"], absent[1]["trunk"])
    keep = TASKS != 1
    assert_close(broken[1]["heads"][keep], absent[1]["heads"][keep])


def mlp_loss(params, task, x, y):
    z = x
    for w in params["trunk"]:
        z = jnp.tanh(z @ w)
    return jnp.mean((z @ params["heads"][task] - y) ** 2)


def sum_of_losses(params, *args):
    return jax.vmap(partial(mlp_loss, params))(*args).sum()


def scanned_loss(params, task, x, y):
    z, _ = jax.lax.scan(lambda z, w: (jnp.tanh(z @ w), None), x, params["trunk"])
    return jnp.mean((z @ params["heads"][task] - y) ** 2)


@pytest.mark.parametrize("width", [2, 4096])
def test_heads_cost_nothing_more(width):
    """Not a second pass through a scanned trunk, nor T gradients of all large heads."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    count, size, batch = 10, 64, 64
    trunk, loss = ([shape(size, size)] * 4, mlp_loss)
    if width == 2:
        trunk, loss = shape(4, size, size), scanned_loss
    params = {"trunk": trunk, "heads": shape(count, size, width)}
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    args = numbers, shape(count, batch, size), shape(count, batch, width)
    total = lambda params, *args: jax.vmap(partial(loss, params))(*args).sum()
    plain = jax.value_and_grad(total)
    shared = lambda path: "trunk" in path
    fn = value_and_task_grads(loss, own_data=True, shared=shared)
    assert flops(fn, params, *args) <= 1.15 * flops(plain, params, *args)
    memory = temporary_memory(plain, params, *args) + 4 * 4 * count * size**2
    assert temporary_memory(fn, params, *args) <= 1.1 * memory


@pytest.mark.parametrize("num_tasks", [10, 50])
def test_costs_of_plain_steps(num_tasks):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    size, batch = 128, 64
    params = {"trunk": [shape(size, size)] * 4, "heads": shape(num_tasks, size, 2)}
    numbers = jax.ShapeDtypeStruct((num_tasks,), jnp.int32)
    args = numbers, shape(num_tasks, batch, size), shape(num_tasks, batch, 2)
    shared = lambda path: "trunk" in path
    options = {"own_data": True, "shared": shared}
    plain = jax.value_and_grad(sum_of_losses)
    tasks = value_and_task_grads(mlp_loss, **options)
    resolve = value_and_grad(mlp_loss, optax_mtl.mgda(), **options)
    losses_only = value_and_grad(mlp_loss, optax_mtl.linear(), **options)
    step = lambda fn: lambda params, *args: fn(params, (), *args)[1]
    unit = flops(plain, params, *args)
    assert flops(tasks, params, *args) <= 1.15 * unit
    assert flops(step(resolve), params, *args) <= 2.3 * unit
    assert flops(step(losses_only), params, *args) <= 1.05 * unit
    # That of the plain sum, and the gradients of two leaves: of one while the Gram
    # matrix is computed, and of the next.
    leaf = 4 * num_tasks * size**2
    most = temporary_memory(plain, params, *args) + 2 * leaf
    assert temporary_memory(step(resolve), params, *args) <= 1.1 * most


def test_sequential_takes_the_memory_of_one_task():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    count, size, batch = 50, 64, 512
    params = {"trunk": [shape(size, size)] * 2, "heads": shape(count, size, 2)}
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    args = numbers, shape(count, batch, size), shape(count, batch, 2)
    fn = value_and_task_grads(
        mlp_loss, own_data=True, shared=lambda path: "trunk" in path, sequential=True
    )
    activations = 4 * count * batch * size
    assert temporary_memory(fn, params, *args) < 0.2 * activations


def labelled(task, x, y, mask):
    return mask.sum()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_accumulated_over_micro_batches_as_in_one_piece(count):
    fn = accumulate_task_grads(
        with_aux, count, has_aux=True, own_data=True, shared=SHARED, num_labels=labelled
    )
    (losses, aux), updates = compiled_fast(fn)(PARAMS, *ARGS)
    assert_close((losses, updates), stacked(sequential=False))
    assert aux["twice"].shape == (count, T)


def test_accumulated_over_where_each_task_is():
    """Without numbers of labels: an average over the micro-batches that have any."""
    fn = accumulate_task_grads(loss_fn, 3, own_data=True, shared=SHARED)
    losses, updates = compiled_fast(fn)(PARAMS, *ARGS)
    grads_fn = compiled_fast(value_and_task_grads(losses_fn, shared=SHARED))
    parts = [grads_fn(PARAMS, TASKS, *(x[:, i::3] for x in ARGS[1:])) for i in range(3)]
    present = np.stack([MASK[:, i::3].sum(axis=1) > 0 for i in range(3)])
    number = np.maximum(present.sum(axis=0), 1)
    mean = lambda xs: np.sum(xs, axis=0) / number.reshape(-1, *[1] * (xs[0].ndim - 1))
    assert_close(losses, mean([part[0] for part in parts]))
    assert_close(updates["trunk"], mean([part[1]["trunk"] for part in parts]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_the_task_axis(kind):
    def loss_fn(params, task, x, y, mask):
        # With explicit axes JAX wants a sharding of what is picked by a sharded number.
        head = jax.nn.one_hot(task, T) @ params["heads"]
        error = x @ params["trunk"] @ head - y
        return jnp.sum(error**2 * mask) / jnp.maximum(mask.sum(), 1)

    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        args = jax.device_put(ARGS, NamedSharding(mesh, P("tasks")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        for mode in ("leafwise", "stacked"):
            fn = value_and_grad(loss_fn, optax_mtl.mgda(), own_data=True, mode=mode)
            step = lambda params, *args, fn=fn: fn(params, (), *args)
            actual = jax.jit(step)(params, *args)
            assert_close(actual, compiled_fast(step)(PARAMS, *ARGS))
        tasks = jax.jit(value_and_task_grads(loss_fn, own_data=True))(params, *args)
    assert_close(tasks[1]["trunk"], by_hand()[1])


@pytest.mark.parametrize("mode", ["auto", "leafwise"])
def test_examples_split_over_devices(mode):
    """Under shard_map, with losses that are averaged over the devices."""
    x, y = (np.concatenate([a, a[:, ::-1]], axis=1)[:, :8] for a in (X, Y))
    mask = np.ones((T, 8), np.float32)
    method = optax_mtl.upgrad()

    def averaged(*args):
        return jax.lax.pmean(loss_fn(*args), "data")

    def step_of(loss):
        options = {"mode": mode, "shared": SHARED, "measure": lambda p: "trunk" in p}
        fn = value_and_grad(loss, method, own_data=True, **options)
        return lambda params, *args: fn(params, (), *args)[:2]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        step_of(averaged),
        mesh=mesh,
        in_specs=(P(), P(), *[P(None, "data")] * 3),
        out_specs=P(),
    )
    args = PARAMS, TASKS, x, y, mask
    assert_close(jax.jit(split)(*args), compiled_fast(step_of(loss_fn))(*args))


MANY = 10
NAMES = [f"task{i}" for i in range(MANY)]
MANY_PARAMS = {"trunk": np.ones((D, D)), "heads": np.ones((MANY, D))}
ROWS = np.ones((MANY, N, D)), np.ones((MANY, N))
NAMED = dict.fromkeys(NAMES, ROWS[0][0]), dict.fromkeys(NAMES, ROWS[1][0])


def of_one(params, task, x, y, activation=jax.nn.gelu):
    z = activation(x @ params["trunk"])
    return jnp.mean((z @ params["heads"][task] - y) ** 2)


def by_name(loss_of):
    return lambda params, x, y: {
        n: loss_of(params, i, x, y) for i, n in enumerate(NAMES)
    }


def over_all(params, x, y):
    numbers = jnp.arange(MANY)
    return jax.vmap(jax.checkpoint(partial(of_one, params)))(numbers, x, y)


def stack_of_all(params, x, y):
    return jnp.stack([of_one(params, i, x[i], y[i]) for i in range(MANY)])


def on_own_points(params, weights):
    """One network at points that it makes itself, and a weight for each task."""
    z = jnp.tanh(jnp.linspace(0, 1, N)[:, None] * params["trunk"][:1])
    return jnp.mean((z @ params["heads"].T) ** 2, axis=0) * weights


of_row = lambda p, i, x, y: of_one(p, i, x[i], y[i])
of_name = lambda p, i, x, y: of_one(p, i, x[NAMES[i]], y[NAMES[i]])
BATCH, LABELS = ROWS[0][0], ROWS[1]
TEN = np.ones((MANY, D))  # As many examples as tasks.
DISJOINT = {
    "vmap": (over_all, ROWS),
    "vmap in jit": (jax.jit(over_all), ROWS),
    "stack": (stack_of_all, ROWS),
    "dict of data": (by_name(of_name), NAMED),
    "dict of rows": (by_name(of_row), ROWS),
    "one objective for each example": (
        lambda p, x: jnp.sum(jnp.tanh(x @ p["trunk"]), axis=1),
        (TEN,),
    ),
}
NOT_DISJOINT = {
    "one batch": (
        lambda p, x, y: jnp.mean((x @ p["trunk"] @ p["heads"].T - y) ** 2, axis=0),
        (TEN, np.ones((MANY, MANY))),
    ),
    "one batch, own labels": (
        by_name(lambda p, i, x, y: of_one(p, i, x, y[i])),
        (BATCH, LABELS),
    ),
    "one batch, own labels, vmap": (
        lambda p, x, y: over_all(p, jnp.broadcast_to(x, (MANY, N, D)), y),
        (BATCH, LABELS),
    ),
    "nothing but what is closed over": (lambda p: over_all(p, *ROWS), ()),
    "a batch that is closed over": (
        by_name(lambda p, i, x, y: jax.jit(partial(of_one, p, i, BATCH))(y[i])),
        ROWS,
    ),
    "the next task's data": (
        by_name(lambda p, i, x, y: of_row(p, i, x, y) + of_row(p, (i + 1) % 10, x, y)),
        ROWS,
    ),
    "the next task's data, vmap": (
        lambda p, x, y: over_all(p, x, jnp.roll(y, 1, axis=0)),
        ROWS,
    ),
    "different losses": (
        by_name(
            lambda p, i, x, y: of_one(
                p, i, x[i], y[i], jnp.tanh if i == 3 else jax.nn.gelu
            )
        ),
        ROWS,
    ),
    "examples that are compared": (
        lambda p, x: jax.nn.logsumexp(x @ p["trunk"] @ x.T, axis=1),
        (TEN,),
    ),
    "statistics of the batch": (
        lambda p, x: jnp.sum(jnp.tanh((x - x.mean(0, keepdims=True)) @ p["trunk"]), 1),
        (TEN,),
    ),
    "points of its own": (on_own_points, (np.ones(MANY),)),
    "few tasks": (lambda p, x, y: over_all(p, x, y)[:8], ROWS),
    "named, few tasks": (
        lambda p, x, y: dict(list(by_name(of_row)(p, x, y).items())[:8]),
        ROWS,
    ),
}


def shapes_of_step(losses_fn, args, way):
    fn = value_and_task_grads(losses_fn)
    if way != "stacked":
        resolve = value_and_grad(losses_fn, optax_mtl.mgda(), mode=way)
        fn = lambda params, *args: resolve(params, (), *args)
    return jax.eval_shape(fn, MANY_PARAMS, *args)


@pytest.mark.parametrize("way", ["stacked", "auto", "gram"])
@pytest.mark.parametrize("case", DISJOINT)
def test_disjoint_data_are_pointed_at_the_argument(case, way):
    losses_fn, args = DISJOINT[case]
    named = "dict" in case and way != "gram"  # Passes of their own: nothing to say.
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        shapes_of_step(losses_fn, args, way)
    assert len(found) == (not named)
    for warning in found:
        assert "10 tasks share no data" in str(warning.message)
        assert "With own_data=True one pass" in str(warning.message)


def test_named_losses_of_disjoint_data_cost_little_without_the_argument():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    size, batch = 64, 64
    heads = {name: shape(size, 2) for name in NAMES}
    params = {"trunk": [shape(size, size)] * 3, "heads": heads}
    args = [{name: shape(batch, n) for name in NAMES} for n in (size, 2)]

    def losses_fn(params, x, y):
        return {name: mlp_loss(params, name, x[name], y[name]) for name in NAMES}

    shared = lambda path: "trunk" in path
    total = lambda *args: sum(losses_fn(*args).values())
    plain = flops(jax.value_and_grad(total), params, *args)
    tasks = value_and_task_grads(losses_fn, shared=shared)
    resolve = value_and_grad(losses_fn, optax_mtl.mgda(), shared=shared)
    step = lambda params, *args: resolve(params, (), *args)
    assert flops(tasks, params, *args) <= 1.15 * plain
    assert flops(step, params, *args) <= 2 * plain


@pytest.mark.parametrize("case", NOT_DISJOINT)
def test_no_false_alarm(case):
    losses_fn, args = NOT_DISJOINT[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes_of_step(losses_fn, args, "stacked")


def test_no_word_where_one_pass_suffices():
    fn = value_and_grad(over_all, optax_mtl.linear())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(fn, MANY_PARAMS, (), *ROWS)


vector = lambda params, task, x, y, mask: (x @ params["trunk"]).sum(axis=1)
named = lambda *args: {"loss": loss_fn(*args)}
own = partial(value_and_task_grads, own_data=True)
MESSAGES = {
    "one loss for each example": (
        lambda: own(vector)(PARAMS, *ARGS),
        r"returns its loss, one number, but returned shapes \(6,\); average",
    ),
    "a dict": (
        lambda: own(named)(PARAMS, *ARGS),
        r"returns its loss, one number, but returned shapes \{'loss': \(\)\}",
    ),
    "resolved": (
        lambda: value_and_grad(vector, optax_mtl.mgda(), own_data=True)(
            PARAMS, (), *ARGS
        ),
        "returns its loss, one number",
    ),
    "different leading sizes": (
        lambda: own(loss_fn)(PARAMS, TASKS, X, Y[:3], MASK),
        r"argument 0 has shape \(4,\) and argument 2 \(3, 6\): stack the data of the"
        " tasks, pad and mask",
    ),
    "different leading sizes in a tree": (
        lambda: own(lambda p, b: 0.0)(PARAMS, {"x": X, "y": Y[:2]}),
        r"argument 0\['x'\] has shape \(4, 6, 3\) and argument 0\['y'\] \(2, 6\)",
    ),
    "a number for all": (
        lambda: own(loss_fn)(PARAMS, *ARGS, 2.0),
        r"argument 4 \(\): .*pass by keyword what is the same for all",
    ),
    "no arguments": (
        lambda: own(lambda params: 0.0)(PARAMS),
        "come as positional arguments, stacked along a leading task axis",
    ),
    "no task": (
        lambda: own(loss_fn)(PARAMS, *(x[:0] for x in ARGS)),
        r"argument 0 of shape \(0,\) holds the data of no task",
    ),
    "one task each": (
        lambda: accumulate_task_grads(loss_fn, 2, own_data=True, one_task_each=True),
        "one_task_each serves one task in each micro-batch",
    ),
    "examples that do not divide": (
        lambda: accumulate_task_grads(loss_fn, 4, own_data=True)(PARAMS, *ARGS),
        "does not split into 4 micro-batches",
    ),
    "forgotten auxiliary data": (
        lambda: own(loss_fn, True)(PARAMS, *ARGS),
        "with has_aux=True, losses_fn should return a pair",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_errors_name_the_remedy(case):
    call, message = MESSAGES[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
