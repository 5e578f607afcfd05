"""Every snippet of the README and of the pages runs, from their own text."""

import contextlib
import csv
import pathlib
import re
import struct
import tempfile
import textwrap
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_mtl
from optax_mtl import nnx as mtl_nnx

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{x.name}" for x in sorted((ROOT / "docs").glob("*.md")))]
FENCE = re.compile(r"^( *)```(python|diff)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
RNG = np.random.default_rng(0)
T = 3
BATCH = (
    jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32),
    jnp.asarray(RNG.normal(size=(8, T)), jnp.float32),
)
PARAMS = {
    "trunk": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32),
    "heads": jnp.asarray(RNG.normal(size=(6, T)), jnp.float32),
}


def snippets(page):
    """The Python code of each block; of a change, what stands after it."""
    found = []
    for _, kind, text in FENCE.findall((ROOT / page).read_text()):
        code = textwrap.dedent(text)
        if kind == "diff":
            lines = [line[1:] for line in code.splitlines() if line[:1] in ("+", " ")]
            code = textwrap.dedent("\n".join(lines))
        found.append(code)
    return found


def losses_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"] - y) ** 2, axis=0)


class Model(nnx.Module):
    """Batch statistics, dropout and heads."""

    def __init__(self, rngs, dropout=0.3):
        self.trunk = nnx.Sequential(
            nnx.Linear(4, 6, rngs=rngs),
            nnx.BatchNorm(6, rngs=rngs),
            nnx.Dropout(dropout, rngs=rngs),
        )
        self.heads = nnx.Linear(6, T, rngs=rngs)

    def __call__(self, x):
        return self.heads(self.trunk(x))


def task_losses(model, batch):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2, axis=0)


def run(code, **names):
    """What the snippet defines, beside small stand-ins for what it takes."""
    names = {
        "jax": jax,
        "jnp": jnp,
        "nnx": nnx,
        "mtl_nnx": mtl_nnx,
        "optax": optax,
        "optax_mtl": optax_mtl,
        "losses_fn": losses_fn,
        "params": PARAMS,
        "batch": BATCH,
    } | names
    exec(compile(code, "snippet", "exec"), names)
    return names


@contextlib.contextmanager
def chdir():
    """A folder of its own to write into."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


def assert_changed(params, other):
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(params) == shapes(other)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(other)):
        assert jnp.isfinite(x).all() and jnp.any(x != y)


def two_lines(code):
    names = run(code)
    params, _ = names["step"](PARAMS, names["tx"].init(PARAMS), BATCH)
    assert_changed(params, PARAMS)


def two_lines_of_nnx(code):
    """As ``nnx.value_and_grad`` for the sum: parameters, statistics and counts."""
    code = code.replace("optax_mtl.upgrad()", "optax_mtl.linear()")
    code = code.replace("optax.adamw(1e-3)", "optax.sgd(0.1)")
    model, plain = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    names = run(code, model=model, losses_fn=task_losses)
    optimizer = nnx.Optimizer(plain, optax.sgd(0.1), wrt=nnx.Param)
    of_sum = lambda model: task_losses(model, BATCH).sum()

    @nnx.jit
    def plain_step(model, optimizer):
        optimizer.update(model, nnx.value_and_grad(of_sum)(model)[1])

    for _ in range(3):
        names["step"](model, names["optimizer"], BATCH)
        plain_step(plain, optimizer)
    assert model.trunk.layers[2].rngs.count[...] == 3
    assert jnp.any(model.trunk.layers[1].mean[...] != 0)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    unwrap = lambda m: optax.tree.unwrap_random_key_data(nnx.to_pure_dict(nnx.state(m)))
    jax.tree.map(same, unwrap(model), unwrap(plain))


def two_lines_of_linen(code):
    linen = nn.Dense(T)
    params = linen.init(jax.random.key(0), BATCH[0])
    fn = lambda params, batch: jnp.mean(
        (linen.apply(params, batch[0]) - batch[1]) ** 2, axis=0
    )
    names = run(code, model=linen, params=params, losses_fn=fn)
    assert_changed(names["state"].params, params)


def parameter_groups(code):
    """The figure has a row for each parameter, and a column for each pair."""
    run(code)
    shown = pyplot.gcf().axes[0].images[0].get_array()
    assert shown.shape == (len(PARAMS), T * (T - 1) // 2)
    pyplot.close("all")


def one_report(code):
    run(code)


def recorded(code):
    names = run(code)
    assert_changed(names["params"], PARAMS)
    assert names["record"].last.names == ("depth", "labels", "normals")
    assert names["record"].seen.max() == 1


def with_recorder():
    """What the page defines before it logs."""
    (code,) = (x for x in snippets("docs/conflicts.md") if "record = " in x)
    names = run(code)
    return {name: names[name] for name in ("step", "params", "opt_state")}


def logged_to_csv(code):
    with chdir():
        run(code, **with_recorder())
        text = pathlib.Path("conflicts.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(-1 <= float(row["min_cosine"]) <= 1 for row in rows)
    assert "cosine/0,1" in rows[0]


def logged_to_tensorboard(code):
    """Events read back: their frames are a length and sums of checks around a proto."""
    from tensorboardX.proto.event_pb2 import Event

    with chdir():
        run(code, **with_recorder())
        (path,) = pathlib.Path("runs/conflicts").iterdir()
        data, found = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    steps, norms = zip(*found["norm/0"])
    assert steps == (0, 1, 2) and min(norms) > 0
    assert "min_cosine" in found


def logged_to_wandb(code):
    """Offline it writes names and numbers, as JSON, into a file of its own."""
    settings = {"WANDB_SILENT": "true", "WANDB_DIR": "."}
    with chdir(), pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        run(code, **with_recorder())
        (path,) = pathlib.Path().glob("wandb/offline-run-*/*.wandb")
        names, patience = (b"min_cosine", b"norm/0", b"cosine/0,1"), 60
        # Another process writes, and may be behind.
        while any(path.read_bytes().count(name) < 3 for name in names):
            patience -= 1
            assert patience, path.read_bytes()
            time.sleep(0.5)


def logged_by_clu(code):
    """That it parses: its writers need TensorFlow, as the page says."""
    compile(code, "snippet", "exec")


def chain_of_all(code):
    tx = run(code)["tx"]
    losses, grads = optax_mtl.value_and_task_grads(losses_fn)(PARAMS, BATCH)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)
    assert_changed(optax_mtl.apply_updates(PARAMS, updates), PARAMS)
    assert optax_mtl.recorded(state).seen.max() == 1


def by_hand(code):
    """The weights of MGDA sum to 1, and the update is that of the method."""
    names = run(code)
    np.testing.assert_allclose(names["weights"].sum(), 1, rtol=1e-5)
    expected, _ = optax_mtl.mgda().update(names["grads"], ())
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, names["update"], expected)


def own_pcgrad(code):
    tx = optax.chain(optax_mtl.pcgrad(), optax.sgd(0.1))
    updates = run(code, tx=tx, state=tx.init(PARAMS))["updates"]
    assert_changed(optax_mtl.apply_updates(PARAMS, updates), PARAMS)


def routed_heads(code):
    names = run(code, labels={"trunk": "shared", "heads": "heads"})
    shared = {"trunk": True, "heads": False}
    _, grads = optax_mtl.value_and_task_grads(losses_fn, shared=shared)(PARAMS, BATCH)
    updates, _ = names["tx"].update(grads, names["tx"].init(PARAMS), PARAMS)
    assert_changed(optax_mtl.apply_updates(PARAMS, updates), PARAMS)


def race(code):
    """Every run learns; all losses fall at the largest rate."""
    names = run(
        code.replace("600", "30"),
        init_fn=lambda key: jax.tree.map(lambda x: x * jax.random.normal(key), PARAMS),
        batch_fn=lambda key, step: BATCH,
        shared=lambda path: "trunk" in path,
    )
    result = names["result"]
    assert result.methods[-4:] == ("upgrad", "cagrad", "nash_mtl", "imtl_l")
    assert jnp.all(result.losses[:, -1, :, -1] < result.losses[:, -1, :, 0])


def own_method(code):
    """In every mode; for g, 2 g and -g the third conflicts with two, they with one."""
    method = run(code)["method"]
    gradient = np.ones((1, 5), np.float32)
    gradients = np.float32([[1], [2], [-1]]) * gradient
    update, _ = method.update(gradients, method.init(None))
    np.testing.assert_allclose(update, (1 / 2 + 2 / 2 - 1 / 3) * gradient[0], rtol=1e-6)
    resolve = lambda mode: optax_mtl.value_and_grad(losses_fn, method, mode=mode)
    grads = {}
    for mode in ("gram", "leafwise", "stacked"):
        fn = resolve(mode)
        grads[mode] = jax.jit(fn)(PARAMS, fn.init(PARAMS), BATCH)[1]
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, grads["gram"], grads["stacked"])
    jax.tree.map(same, grads["leafwise"], grads["stacked"])


def own_method_tried(code):
    run(code, method=run(snippets("docs/own_method.md")[0])["method"])


def whole_chain(code):
    names = run(code)
    params, _, losses = names["step"](PARAMS, names["state"], BATCH)
    assert losses.shape == (T,)
    assert_changed(params, PARAMS)


def missing_labels(code):
    mean = run(code)["masked_mean"]
    errors = jnp.array([1.0, 2, 3])
    assert mean(errors, jnp.array([1.0, 0, 1])) == 2
    assert mean(errors, jnp.zeros(3)) == 0


def balanced_first(code):
    """Learned weights that are equal at first: the step of CAGrad alone."""
    steps = []
    for tx in (run(code)["tx"], optax.chain(optax_mtl.cagrad(), optax.adamw(1e-3))):
        optax_mtl.check(tx, PARAMS, num_tasks=T)
        losses, grads = optax_mtl.value_and_task_grads(losses_fn)(PARAMS, BATCH)
        steps.append(tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), *steps)


def heads_of_nnx(code):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    names = run(
        code,
        model=model,
        method=optax_mtl.inverse_norm(),
        losses_fn=task_losses,
    )
    state = names["method_state"]
    for _ in range(3):
        losses, state = names["step"](model, optimizer, state, BATCH)
    assert losses.shape == (T,)
    assert model.trunk.layers[2].rngs.count[...] == 3
    assert jnp.any(model.trunk.layers[1].mean[...] != 0)
    kernel = lambda state: state["trunk"]["layers"][0]["kernel"][...]
    assert jnp.any(kernel(before) != kernel(nnx.state(model, nnx.Param)))


def equinox_model(code):
    """As the ordinary step of Equinox for the sum."""
    import equinox as eqx

    code = code.replace("optax_mtl.upgrad()", "optax_mtl.linear()")
    code = code.replace("optax.adamw(1e-3)", "optax.sgd(0.1)")
    model = eqx.nn.MLP(4, T, 6, 1, key=jax.random.key(0))  # With functions as leaves.
    fn = lambda model, batch: jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2, 0)
    names = run(code, eqx=eqx, model=model, losses_fn=fn)
    actual, _ = names["step"](model, names["opt_state"], BATCH)
    grads = eqx.filter_grad(lambda model: fn(model, BATCH).sum())(model)
    expected = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
    for x, y in zip(
        *(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (actual, expected))
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def haiku_model(code):
    """The sum of the task gradients, and the statistics, are those of the sum."""
    import haiku as hk

    def network(x):
        return hk.Linear(T)(hk.BatchNorm(True, True, 0.9)(hk.Linear(6)(x), True))

    model = hk.transform_with_state(network)
    params, state = model.init(jax.random.key(0), BATCH[0])
    names = run(code, model=model, params=params, state=state, rng=None)

    def of_sum(params):
        losses, new_state = names["losses_fn"](params, state, None, BATCH)
        return losses.sum(), new_state

    expected, expected_state = jax.grad(of_sum, has_aux=True)(params)
    actual = jax.tree.map(lambda g: g.sum(axis=0), names["grads"])
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, actual, expected)
    jax.tree.map(close, names["state"], expected_state)


def kauldron_step(code):
    """That it parses: the page says that it is not run here, and why."""
    compile(code, "snippet", "exec")


def transformer():
    """Parameters, a batch of tokens from T sources, and the parts of the losses."""
    size, layers, vocabulary = 16, 3, 24
    draw = lambda *shape: np.float32(0.3 * RNG.normal(size=shape))
    params = {
        "embed": draw(vocabulary, size),
        "layers": {
            "attend": draw(layers, size, 3 * size),
            "project": draw(layers, size, size),
            "up": draw(layers, size, 32),
            "down": draw(layers, 32, size),
        },
    }
    tokens, sources = RNG.integers(vocabulary, size=(16, 9)), np.arange(16) % T
    batch = {"tokens": tokens[:, :-1], "next": tokens[:, 1:], "source": sources}

    def normalize(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def block(weights, x):
        q, k, v = jnp.split(normalize(x) @ weights["attend"], 3, axis=-1)
        heads = lambda x: x.reshape(*x.shape[:2], 2, -1)
        mixed = jax.nn.dot_product_attention(
            heads(q), heads(k), heads(v), is_causal=True
        )
        x = x + mixed.reshape(x.shape) @ weights["project"]
        return x + jax.nn.gelu(normalize(x) @ weights["up"]) @ weights["down"]

    def task_losses(embed, x, batch):
        loss = optax.softmax_cross_entropy_with_integer_labels(
            normalize(x) @ embed.T, batch["next"]
        )
        ours = batch["source"][:, None] == jnp.arange(T)
        return ours.T @ loss.mean(axis=1) / ours.sum(axis=0)

    return params, batch, {"block": block, "task_losses": task_losses}


def sharded_transformer(code):
    """Eight devices, and each mode, do what one device does with stacked gradients."""
    params, batch, parts = transformer()
    code = code.replace("optax.adamw(1e-3)", "optax.sgd(0.1, momentum=0.9)")
    one = code.replace("make_mesh((8,)", "make_mesh((1,)").replace(
        '"gram"', '"stacked"'
    )

    def train(code):
        names = run(code, params=params, batch=batch, **parts)
        p, state = names["params"], names["state"]
        shardings = jax.tree.map(lambda x: x.sharding, (p, state))
        for _ in range(2):
            p, state, losses = names["step"](p, state, names["batch"])
        kept = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim)
        assert jax.tree.all(jax.tree.map(kept, (p, state), shardings))
        return jax.device_get((p, losses))

    expected, expected_losses = train(one)
    assert_changed(expected, params)
    for mode in ("gram", "leafwise", "stacked"):
        actual, losses = train(code.replace('"gram"', f'"{mode}"'))
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, actual, expected)
        close(losses, expected_losses)


def freezing(code):
    tx = run(code, labels={"trunk": "freeze", "heads": "train"})["tx"]
    _, grads = optax_mtl.value_and_task_grads(losses_fn)(PARAMS, BATCH)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert not updates["trunk"].any() and updates["heads"].any()


CHECKS = {
    "README.md": [two_lines, parameter_groups, race],
    "docs/chains.md": [chain_of_all],
    "docs/choose.md": [race],
    "docs/coming_from.md": [own_pcgrad],
    "docs/conflicts.md": [
        one_report,
        parameter_groups,
        recorded,
        logged_to_csv,
        logged_to_tensorboard,
        logged_to_wandb,
        logged_by_clu,
    ],
    "docs/frameworks.md": [
        two_lines_of_nnx,
        two_lines_of_linen,
        heads_of_nnx,
        equinox_model,
        haiku_model,
        kauldron_step,
    ],
    "docs/gradients.md": [whole_chain],
    "docs/index.md": [two_lines, by_hand],
    "docs/own_method.md": [own_method, own_method_tried],
    "docs/recipes.md": [missing_labels, balanced_first, sharded_transformer, freezing],
    "docs/what_a_method_sees.md": [routed_heads],
}
CASES = [(page, i) for page, checks in CHECKS.items() for i in range(len(checks))]


def test_every_snippet_has_a_check():
    counts = {page: len(snippets(page)) for page in PAGES}
    expected = {page: len(CHECKS.get(page, [])) for page in PAGES}
    assert counts == expected, "add a check for the new snippet, in order"


@pytest.mark.parametrize(("page", "number"), CASES)
def test_snippet(page, number):
    with jax.numpy_rank_promotion("allow"):  # As users have it.
        CHECKS[page][number](snippets(page)[number])
