"""The category discovery example: objective, evaluation, weights, runs and resuming.

Golden values of losses and diagnostics were produced in float64 by the official
SimGCD and EAGC code; other expected values are worked out here.
"""

import functools
import math
import pathlib
import pickle
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

from examples import runs
from examples.gcd import data, model, objective, report, train, weights
from examples.gcd.config import Config, parse
from tests.common import flops


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def wave(rows, columns, offset=0.0, frequency=1.0):
    steps = jnp.arange(1, rows * columns + 1, dtype=float).reshape(rows, columns)
    return jnp.sin(offset + frequency * steps)


def close(actual, desired, rtol=1e-9):
    np.testing.assert_allclose(actual, desired, rtol=rtol)


# Objective


def test_golden_losses(x64):
    logits = wave(6, 4, 0.3)
    temperature = lambda epoch: objective.teacher_temperature(epoch, 30)
    close(objective.self_distillation(logits, temperature(0)), 1.2821734251)
    close(objective.self_distillation(logits, temperature(50)), 1.1966845122)
    close(objective.mean_entropy(logits), 0.2001536150)
    labels, labelled = jnp.array([2, 3, 0] * 2), jnp.array([True, False, True] * 2)
    loss = objective.supervised_cross_entropy(logits, labels, labelled)
    close(loss, 4.3212594089)


def test_golden_contrast(x64):
    projections = wave(6, 5, 0.7, 0.9)
    close(objective.contrast(projections), 1.0205582582)
    close(objective.contrast(projections, 0.07), 1.1869365989)
    everything = jnp.ones(6, bool)
    loss = objective.supervised_contrast(
        projections, jnp.array([1, 1, 0] * 2), everything
    )
    close(loss, 5.1717158498)


def test_golden_teacher_temperature(x64):
    epochs = [0, 1, 15, 29, 30, 99]
    values = [objective.teacher_temperature(epoch, 30) for epoch in epochs]
    close(values, [0.07, 0.0689655172, 0.0544827586, 0.04, 0.04, 0.04])


def test_unlabelled_rows_are_no_candidates(x64):
    """Supervised contrast of some rows equals that of those rows alone."""
    projections, labels = wave(10, 5), jnp.array([1, 0, 1, 2, 0] * 2)
    labelled = jnp.array([True, False, True, True, False] * 2)
    contrast = jax.jit(objective.supervised_contrast)
    some = contrast(projections, labels, labelled)
    rows = np.flatnonzero(labelled)
    alone = contrast(projections[rows], labels[rows], jnp.ones(6, bool))
    close(some, alone)


def test_batch_without_labels_has_no_supervised_loss():
    def supervised(x):
        return objective.simgcd(x, x, jnp.zeros(6, int), jnp.zeros(6, bool), 0.07)[0]

    loss, gradient = jax.jit(jax.value_and_grad(supervised))(wave(6, 4))
    assert loss == 0
    assert (gradient == 0).all()


def test_extreme_logits_stay_finite():
    # Identical certain predictions: the mean has exact zeros.
    logits = jnp.tile(jnp.array([[200.0, 0.0, -200.0]]), (4, 1))
    loss, gradient = jax.jit(jax.value_and_grad(objective.mean_entropy))(logits)
    close(loss, math.log(3), 1e-6)
    assert jnp.isfinite(gradient).all()


def test_rank_statistics_pairs_images_with_the_same_strongest_features():
    # Unlabelled images 0 and 1 share their two strongest features; 2 has others, and
    # 3 is labelled. Probabilities of being of one class, by hand: rows of `same`.
    z = jnp.array([[3.0, -2, 0, 1], [2.0, 3, 1, 0], [0, 1, 2.0, 3], [1, 1, 1, 1]])
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    logits = jnp.log(jnp.tile(probs, (2, 1))) * objective.STUDENT_TEMPERATURE
    labelled = jnp.tile(jnp.array([False, False, False, True]), 2)
    supervised, unsupervised = objective.rank_statistics(
        jnp.tile(z, (2, 1)), logits, jnp.zeros(8, int), labelled, k=2
    )
    same = probs[:3] @ probs[:3].T
    alike = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    expected = -np.where(alike, np.log(same), np.log(1 - same)).mean()
    close(unsupervised, expected, 1e-5)  # Equal views: no inconsistency.
    close(supervised, -math.log(0.5), 1e-5)


# Evaluation


def test_golden_accuracy():
    truth = np.repeat([0, 1, 2, 3], [5, 3, 4, 2])
    prediction = np.array([3, 3, 3, 3, 3, 0, 3, 3, 1, 1, 2, 2, 2, 2])
    actual = report.accuracy(truth, prediction, num_known=2)
    close([actual[k] for k in ("all", "old", "new")], [10 / 14, 0.75, 2 / 3])
    actual = report.accuracy(truth, prediction, num_known=2, balanced=True)
    close(
        [actual[k] for k in ("all", "old", "new")], [0.7083333, 0.6666667, 0.75], 1e-6
    )


def test_one_assignment_serves_known_and_novel():
    # Cluster 0 holds 2 of class 0 (known) and 3 of class 1 (novel): it goes to the
    # novel class, so the known one gets none, though alone it would get both.
    truth = np.array([0, 0, 1, 1, 1])
    prediction = np.zeros(5, int)
    actual = report.accuracy(truth, prediction, num_known=1)
    assert actual == {"all": 0.6, "old": 0.0, "new": 1.0}


def test_accuracy_of_an_empty_group_is_nan():
    actual = report.accuracy(np.array([0, 1]), np.array([1, 0]), num_known=2)
    assert actual["all"] == actual["old"] == 1.0
    assert math.isnan(actual["new"])


def test_golden_diagnostics(x64):
    known = np.asarray(wave(6, 4, 0.1))
    novel = np.cos(0.7 * np.arange(1, 21)).reshape(5, 4)
    close(report.subspace_overlap(known, novel, 2), 0.9375953417)
    close(report.subspace_overlap(known, novel, 1), 0.6080400360)
    supervised = {"a": wave(1, 4), "b": jnp.sin(jnp.array([5.0, 6.0]))}
    unsupervised = {"a": wave(1, 4, 1.0), "b": jnp.sin(jnp.array([6.0, 7.0]))}
    total = jax.tree.map(jnp.add, supervised, unsupervised)
    close(report.gradient_deviation(supervised, total), 0.1178168073)
    nothing = jax.tree.map(jnp.zeros_like, total)
    assert jnp.isnan(report.gradient_deviation(nothing, total))


# Data


def test_split_follows_the_protocol():
    split = data.make_split(*data.load("digits"), Config())
    known = split.labels < 5
    assert (split.num_known, split.num_classes) == (5, 10)
    assert len(split.labelled) == known.sum() // 2
    assert known[split.labelled].all()
    everything = np.concatenate([split.labelled, split.unlabelled])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(split.labels)))
    np.testing.assert_array_equal(split.novel, np.flatnonzero(~known))
    again = data.make_split(*data.load("digits"), Config())
    np.testing.assert_array_equal(split.labelled, again.labelled)
    other = data.make_split(*data.load("digits"), Config(seed=1))
    assert (split.labelled != other.labelled).any()


def test_half_of_a_batch_is_labelled():
    labelled, unlabelled = jnp.arange(10), jnp.arange(10, 100)
    rows = data.draw(jax.random.key(0), labelled, unlabelled, 10_000)
    counts = np.bincount(rows, minlength=100)
    # Five standard deviations of a binomial.
    assert abs(counts[:10].sum() - 5000) < 250
    assert (abs(counts[:10] - 500) < 110).all()
    assert (abs(counts[10:] - 5000 / 90) < 40).all()


def test_views_are_random_and_keep_the_shape():
    images = jnp.asarray(data.load("digits")[0][:4])
    first = data.view(jax.random.key(0), images, Config(flip=True))
    second = data.view(jax.random.key(1), images, Config(flip=True))
    assert first.shape == images.shape
    assert (jnp.abs(first - second).max((1, 2, 3)) > 0.05).all()
    assert jnp.abs(first).max() <= 1


@pytest.mark.parametrize("kind", ["npz", "cifar10", "cifar100"])
def test_loads_files(kind, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
    labels = np.array([3, 1, 2, 0, 1, 3])
    path = tmp_path
    if kind == "npz":
        path = tmp_path / "images.npz"
        np.savez(path, x=images, label=labels)
    else:
        rows = images.transpose(0, 3, 1, 2).reshape(6, -1)
        key = {"cifar10": b"labels", "cifar100": b"fine_labels"}[kind]
        names = ["data_batch_1", "data_batch_2"] if kind == "cifar10" else ["train"]
        for name, part in zip(names, np.array_split(np.arange(6), len(names))):
            batch = {b"data": rows[part], key: labels[part].tolist()}
            (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    actual, actual_labels = data.load(str(path))
    np.testing.assert_array_equal(actual, images)
    np.testing.assert_array_equal(actual_labels, labels)


# Weights files

PRESET = model.Preset("vit", 16, 2, patch=4, num_heads=2)


def weights_file(layout, grid=2, preset=PRESET, seed=0):
    """A random file with the names and shapes of the published ones."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: (0.3 * rng.normal(size=shape)).astype(np.float32)
    d, p = preset.width, preset.patch
    tensors = {
        "cls_token": array(1, 1, d),
        "pos_embed": array(1, 1 + grid**2, d),
        "patch_embed.proj.weight": array(d, 3, p, p),
        "patch_embed.proj.bias": array(d),
        "norm.weight": array(d),
        "norm.bias": array(d),
    }
    for i in range(preset.depth):
        for name, shape in [
            ("norm1", (d,)),
            ("attn.qkv", (3 * d, d)),
            ("attn.proj", (d, d)),
            ("norm2", (d,)),
            ("mlp.fc1", (4 * d, d)),
            ("mlp.fc2", (d, 4 * d)),
        ]:
            tensors[f"blocks.{i}.{name}.weight"] = array(*shape)
            tensors[f"blocks.{i}.{name}.bias"] = array(shape[0])
        if "dinov2" in layout:
            tensors[f"blocks.{i}.ls1.gamma"] = array(d)
            tensors[f"blocks.{i}.ls2.gamma"] = array(d)
    if "dinov2" in layout:
        tensors["mask_token"] = array(1, d)
    return tensors


def hugging_face(tensors):
    """The same tensors under the names of Hugging Face's ViTModel or Dinov2Model."""
    embeddings = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    layers = {"attn.proj": "attention.output.dense"}
    if "mask_token" in tensors:
        layers |= {"ls1": "layer_scale1", "ls2": "layer_scale2"}
        renamed = {}
    else:
        layers |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        layers |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        renamed = {"pooler.dense.weight": np.zeros((1, 1), np.float32)}
    for name, tensor in tensors.items():
        if name in embeddings:
            renamed[embeddings[name]] = tensor
            continue
        i, part, leaf = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(\w+)", name).groups()
        layer = f"encoder.layer.{i}"
        if part == "attn.qkv":
            for which, third in zip(("query", "key", "value"), np.split(tensor, 3)):
                renamed[f"{layer}.attention.attention.{which}.{leaf}"] = third
        else:
            leaf = leaf.replace("gamma", "lambda1")
            renamed[f"{layer}.{layers.get(part, part)}.{leaf}"] = tensor
    return renamed


def numpy_vit(tensors, images, preset=PRESET):
    """DINO's forward pass, written down from its definition, in NumPy."""
    erf = np.vectorize(math.erf)
    linear = lambda x, name: x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    n, size, _, _ = images.shape
    p, d, heads = preset.patch, preset.width, preset.num_heads
    kernel = tensors["patch_embed.proj.weight"]
    tokens = [np.broadcast_to(tensors["cls_token"][0], (n, 1, d))]
    for row in range(0, size, p):
        for column in range(0, size, p):
            patch = images[:, row : row + p, column : column + p]
            token = np.einsum("nijc,dcij->nd", patch, kernel)
            tokens.append((token + tensors["patch_embed.proj.bias"])[:, None])
    x = np.concatenate(tokens, 1) + tensors["pos_embed"]
    for i in range(preset.depth):
        block = f"blocks.{i}"
        scales = [tensors.get(f"{block}.ls{k}.gamma", 1.0) for k in (1, 2)]
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        mixed = []
        for head in range(heads):
            span = slice(head * d // heads, (head + 1) * d // heads)
            q, k, v = (qkv[..., j * d : (j + 1) * d][..., span] for j in range(3))
            scores = q @ k.transpose(0, 2, 1) / math.sqrt(d // heads)
            attention = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(attention / attention.sum(-1, keepdims=True) @ v)
        x = x + scales[0] * linear(np.concatenate(mixed, -1), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = x + scales[1] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize(
    "layout", ["dino", "dinov2", "hugging face", "hugging face dinov2"]
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_file_gives_the_features_of_dino(layout, suffix, tmp_path):
    tensors = weights_file(layout)
    stored = hugging_face(tensors) if "hugging face" in layout else tensors
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **stored)
    else:
        save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, path)
    preset = PRESET._replace(layer_scale="dinov2" in layout)
    backbone = model.ViT(preset, (8, 8, 3), jnp.float32, nnx.Rngs(0))
    weights.load(backbone, str(path))
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    expected = numpy_vit(tensors, images, preset)
    actual = jax.jit(lambda x: backbone(x))(images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_positions_are_resized_to_the_grid(tmp_path):
    tensors = weights_file("dino", grid=4)
    np.savez(tmp_path / "weights.npz", **tensors)
    backbone = model.ViT(PRESET, (8, 8, 3), jnp.float32, nnx.Rngs(0))
    weights.load(backbone, str(tmp_path / "weights.npz"))
    assert backbone.pos_embed.shape == (1, 5, 16)
    np.testing.assert_array_equal(backbone.pos_embed[0, 0], tensors["pos_embed"][0, 0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), "blocks.1.mlp.fc1.bias is missing"),
        (
            lambda t: t.update({"blocks.2.norm1.bias": t["norm.bias"]}),
            "no place for.*2",
        ),
        (
            lambda t: t.update({"norm.weight": np.ones(8)}),
            r"norm.weight becomes \(8,\)",
        ),
        (
            lambda t: t.update({"pos_embed": np.ones((1, 4, 16))}),
            "pos_embed has 4 rows",
        ),
    ],
)
def test_weights_file_that_does_not_fit(change, message, tmp_path):
    tensors = weights_file("dino")
    change(tensors)
    np.savez(tmp_path / "weights.npz", **tensors)
    backbone = model.ViT(PRESET, (8, 8, 3), jnp.float32, nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        weights.load(backbone, str(tmp_path / "weights.npz"))


def test_weights_file_of_another_kind(tmp_path):
    backbone = model.ViT(PRESET, (8, 8, 3), jnp.float32, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\.safetensors or \.npz"):
        weights.load(backbone, str(tmp_path / "weights.pth"))
    np.savez(tmp_path / "weights.npz", **weights_file("dino"))
    mlp = model.MLPNet(model.PRESETS["mlp"], (8, 8, 1), jnp.float32, nnx.Rngs(0))
    with pytest.raises(ValueError, match="for a ViT, not a MLPNet"):
        weights.load(mlp, str(tmp_path / "weights.npz"))


def test_published_sizes():
    """The parameter counts of ViT-S/16, ViT-B/16 and DINOv2's ViT-B/14."""
    for name, size in [
        ("vit_s16", 21_665_664),
        ("vit_b16", 85_798_656),
        (
            "vit_b14",
            85_798_656 + 768 * 3 * (14**2 - 16**2) + (256 - 196) * 768 + 18_432,
        ),
    ]:
        make = functools.partial(model.ViT, model.PRESETS[name], (224, 224, 3))
        backbone = nnx.eval_shape(lambda make=make: make(jnp.float32, nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(backbone))
        assert sum(math.prod(leaf.shape) for leaf in leaves) == size


# Runs

SMALL = [
    *("--preset", "mlp"),
    *("--max-images", "150", "--batch-size", "16", "--reference-epochs", "1"),
    *("--epochs", "3", "--save-every", "1", "--diagnose-steps", "27"),
    *("--soc-every", "6"),
]


def run(out, *flags):
    return train.main([*SMALL, "--out", str(out), *flags])


class FakeWriter:
    """Stands for the writer of tensorboardX, which the tests do without."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step = folder, purge_step
        self.scalars = []
        self.closed = False
        FakeWriter.last = self

    def add_scalar(self, name, value, step):
        assert not self.closed
        self.scalars.append((name, step, value))

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of EAGC, logged for TensorBoard, too."""
    out = tmp_path_factory.mktemp("gcd") / "run"
    module = types.SimpleNamespace(SummaryWriter=FakeWriter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", module)
        return out, run(out, "--tensorboard")


def test_run_writes_results_logs_and_figures(finished):
    out, results = finished
    assert set(results) == {"all", "old", "new", "gdc", "soc"}
    assert all(0 <= value <= 2 for value in results.values())
    steps, epochs = runs.read(out / "steps.csv"), runs.read(out / "epochs.csv")
    assert [row["step"] for row in steps] == list(range(3 * (150 // 16)))
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert sum(not math.isnan(row["gdc"]) for row in steps) == 27
    assert sum(not math.isnan(row["soc"]) for row in steps) == 5
    for name in "curves.png", "features.png", "result.json":
        assert (out / name).stat().st_size > 0


def test_tensorboard_gets_the_rows_of_the_logs(finished):
    out, _ = finished
    writer = FakeWriter.last
    assert writer.folder == str(out / "tensorboard") and writer.closed
    assert writer.purge_step == 0
    steps, epochs = runs.read(out / "steps.csv"), runs.read(out / "epochs.csv")
    written = lambda name: [(s, v) for n, s, v in writer.scalars if n == name]
    assert written("supervised") == [(r["step"], r["supervised"]) for r in steps]
    assert written("all") == [(9 * r["epoch"], r["all"]) for r in epochs]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        runs.tensorboard(tmp_path, 0)


def test_losses_that_are_not_finite_stop_the_run(tmp_path):
    metrics = {"step": 0, "supervised": math.nan, "unsupervised": 1.0}
    step = lambda state, *_, diagnose: (state, metrics)
    experiment = train.Experiment(None, step, None, None, steps_per_epoch=1)
    config = Config(out=str(tmp_path), diagnose_steps=0)
    with pytest.raises(FloatingPointError, match=r"step 0 are not finite.*--lr"):
        train.discover(config, experiment, None, None, None, None, 0, None)


def restore(out, epoch):
    with ocp.CheckpointManager(out / "checkpoints") as saved:
        return saved.restore(epoch, args=ocp.args.StandardRestore())


def test_resume_bit_for_bit(finished, tmp_path):
    out, _ = finished
    resumed = tmp_path / "run"
    shutil.copytree(out, resumed)
    shutil.rmtree(resumed / "checkpoints" / "3")
    run(resumed, "--resume")
    for name in "steps.csv", "epochs.csv", "result.json":
        assert (out / name).read_text() == (resumed / name).read_text()
    data_of = lambda tree: jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        tree,
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        data_of(restore(out, 3)),
        data_of(restore(resumed, 3)),
    )


def test_a_finished_run_is_not_overwritten(finished):
    with pytest.raises(FileExistsError, match="--resume"):
        run(finished[0])


def test_resume_refuses_other_settings(finished):
    with pytest.raises(ValueError, match="method 'eagc', not 'sum'"):
        run(finished[0], "--resume", "--method", "sum")


def test_catalogue_method_convnet_and_rank_statistics(tmp_path):
    results = run(
        tmp_path,
        *("--objective", "rankstats"),
        *("--method", "pcgrad", "--preset", "convnet", "--epochs", "1"),
        *("--image-size", "12", "--trainable", "last", "--flip"),
    )
    assert 0 <= results["all"] <= 1
    config = parse(["--preset", "convnet", "--trainable", "last"])
    split, _ = train.prepare(config)
    reference = train.make_reference(config, split)
    untrained = nnx.to_flat_state(nnx.state(reference))
    trained = [path for path, _ in untrained if train._trains(config)(path, None)]
    assert {path[:3] for path in trained if path[0] == "backbone"} == {
        ("backbone", "blocks", 2)
    }


def test_blocks_that_do_not_train_are_computed_once():
    """The reference then costs the forward pass of its last block alone."""
    costs = {}
    for method in "eep", "eagc":
        flags = "--preset small --trainable last --image-size 16 --batch-size 8"
        config = parse([*flags.split(), "--method", method, "--max-images", "100"])
        split, images = train.prepare(config)
        backbone = nnx.state(train.make_reference(config, split).backbone)
        experiment = train.make_experiment(config, split)
        state, frozen = train.start(config, experiment, split, backbone)
        costs[method] = flops(experiment.step, state, frozen, images)
    four_blocks = flops(
        experiment.before, frozen.reference, frozen.rest, images.images[:16]
    )
    assert costs["eagc"] - costs["eep"] < four_blocks / 3


def test_backbone_weights_reach_the_reference(tmp_path):
    preset = model.PRESETS["tiny"]
    tensors = weights_file("dino", preset=preset)
    path = tmp_path / "weights.npz"
    np.savez(path, **tensors)
    config = Config(backbone_weights=str(path))
    split, _ = train.prepare(config)
    assert split.images.shape[-1] == 3
    backbone = train.make_reference(config, split).backbone
    np.testing.assert_array_equal(backbone.norm.bias[...], tensors["norm.bias"])


def test_nan_weights_are_noticed(tmp_path):
    tensors = weights_file("dino", preset=model.PRESETS["tiny"])
    tensors["norm.bias"][0] = np.nan
    np.savez(tmp_path / "weights.npz", **tensors)
    with pytest.raises(ValueError, match=r"features.*NaN"):
        run(
            tmp_path / "run",
            *("--backbone-weights", str(tmp_path / "weights.npz")),
            *("--preset", "tiny", "--trainable", "last", "--reference-epochs", "0"),
        )


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--known", "11"], ValueError, "--known 11.*10 classes"),
        (["--max-classes", "12"], ValueError, "--max-classes 12.*10 classes"),
        (["--known", "10"], ValueError, "and 0 of novel classes"),
        (["--max-classes", "1"], ValueError, "leave 0 labelled images"),
        (["--labelled-share", "1e-6"], ValueError, "leave 0 labelled images"),
        (["--preset", "mini"], ValueError, "do not divide into patches of 7"),
        (["--data", "nowhere.npz"], FileNotFoundError, "--data nowhere.npz"),
    ],
)
def test_bad_flags(flags, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path, *flags)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros((4, 8, 8, 2)), "y": np.zeros(4)}, "images have the shape"),
        ({"x": np.zeros((4, 8, 8)), "y": np.zeros(3)}, "labels of shape"),
        ({"x": np.zeros((4, 8, 8))}, "none of"),
        ({"x": np.zeros((4, 8, 8)), "y": np.zeros(4)}, "float64, not uint8"),
    ],
)
def test_bad_files(arrays, message, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(str(path))


def test_folder_without_batches(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_batch"):
        data.load(str(pathlib.Path(tmp_path)))
