"""The self-supervised example end to end, in miniature."""

import csv
import json
import pathlib
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from skimage.metrics import structural_similarity

from examples import runs
from examples.gcd import model as gcd_model
from examples.gcd import weights
from examples.ssl import config as config_lib
from examples.ssl import data, measure, model, train

SMALL = [
    *("--image-size", "8", "--batch-size", "16", "--micro-batches", "2"),
    *("--decoder-width", "8", "--decoder-depth", "0", "--decoder-heads", "1"),
    *("--steps", "4", "--warmup-steps", "1", "--eval-every", "2"),
    *("--eval-images", "16", "--devices", "1"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A few gray images with structure, and labels."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 6, 8) * rng.uniform(0.5, 2, (60, 1)))
    images = (waves[:, None] * waves[:, :, None] * 100 + 128).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    np.savez(path, x=images, y=np.arange(60) % 3)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def tiny_encoders():
    """Two encoders that compile quickly; without XLA's optimizations, all does."""
    mobile = model.MobileNet(stem=4, rows=((3, 8, 8, True, True, 2),), width=8)
    convnext = model.ConvNeXt(widths=(4,), depths=(1,), kernel=3)
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ENCODERS, "mobile", mobile)
        patch.setitem(model.ENCODERS, "convnext", convnext)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def _log(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _checkpoint(folder, step):
    files = sorted((folder / "checkpoints" / str(step)).rglob("*"))
    assert files
    manager = ocp.StandardCheckpointer()
    return manager.restore((folder / "checkpoints" / str(step) / "default").absolute())


@pytest.fixture(scope="module")
def gcond_run(file, tiny_encoders, tmp_path_factory):
    """Flags and folder of a run of stochastic GCond."""
    flags = [*SMALL, "--data", file, "--encoder", "convnext"]
    flags += ["--decoder-depth", "1", "--dropout", "0.1"]
    folder = tmp_path_factory.mktemp("gcond")
    train.main([*flags, "--out", str(folder)])
    return flags, folder


def test_category_discovery_reads_the_encoder(gcond_run, file):
    """The weights of the last step, for images normalised as the discovery's are."""
    flags, folder = gcond_run
    preset = gcd_model.Preset("convnext", 4, 2, encoder="convnext")
    backbone = gcd_model.make_backbone(preset, (8, 8, 1), jnp.float32, nnx.Rngs(0))
    weights.load(backbone, str(folder / "encoder.npz"))
    with runs.open_checkpoints(folder) as saved:
        state = saved.restore(saved.latest_step(), args=ocp.args.StandardRestore())
    kept = state["params"]["encoder"]["norm"]["scale"]["value"]
    np.testing.assert_array_equal(backbone.norm.scale[...], kept)
    written = np.load(folder / "encoder.npz")["statistics"]
    statistics = data.load(config_lib.parse(flags)).statistics()
    np.testing.assert_allclose(written, np.array(statistics), rtol=1e-6)


def test_what_a_run_leaves(gcond_run):
    _, folder = gcond_run
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["l1"] < 3 and 0 < results["ssim"] < 2
    for name in ("curves.png", "reconstructions.png"):
        assert (folder / name).stat().st_size > 0
    rows = _log(folder)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert {"l1", "ssim", "cosine", "conflicts", "winner"} < rows[0].keys()
    assert rows[1]["valid_ssim"] and not rows[0]["valid_ssim"]


def test_resumes_bit_for_bit(gcond_run, tmp_path):
    flags, whole = gcond_run
    out = tmp_path / "run"
    flags = [*flags, "--out", str(out)]
    # As a kill after step 4 leaves it, before its checkpoint is written.
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "4")
    (out / "results.json").unlink()
    with pytest.raises(
        FileExistsError, match="checkpoint 2: continue it with --resume"
    ):
        train.main(flags)
    with pytest.raises(ValueError, match="method 'gcond', not 'pcgrad'"):
        train.main([*flags, "--resume", "--method", "pcgrad"])
    train.main([*flags, "--resume"])
    assert _log(out) == _log(whole)
    jax.tree.map(
        np.testing.assert_array_equal, _checkpoint(out, 4), _checkpoint(whole, 4)
    )


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self, folder, purge_step):
        self.purge_step, self.scalars, self.closed = purge_step, {}, False
        Board.last = self

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def close(self):
        self.closed = True


def test_exact_mode_with_a_third_task_in_evaluation_mode(file, tmp_path, monkeypatch):
    tensorboard = SimpleNamespace(SummaryWriter=Board)
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    results = train.main(
        [
            *SMALL,
            *("--data", file, "--encoder", "mobile", "--method", "cagrad"),
            *("--mode", "exact", "--third-task", "contrastive", "--steps", "2"),
            *("--momentum", "0", "--bfloat16", "--evaluation-mode"),
            *("--tensorboard", "--out", str(tmp_path)),
        ]
    )
    assert results.keys() == {"contrastive", "l1", "ssim", "images_per_second"}
    statistics = _checkpoint(tmp_path, 2)["statistics"]
    for value in jax.tree.leaves(statistics):  # Means and variances as at the start.
        assert np.isin(value, [0, 1]).all()
    row = _log(tmp_path)[1]
    assert Board.last.scalars["l1", 2] == pytest.approx(float(row["l1"]), 1e-4)
    assert Board.last.purge_step == 1 and Board.last.closed


def test_two_devices_do_what_one_does(file, tmp_path):
    logs, statistics = [], []
    for devices in ("1", "2"):
        out = tmp_path / devices
        flags = ["--data", file, "--encoder", "mobile", "--method", "sum"]
        flags += ["--third-task", "classification", "--steps", "2"]
        flags += ["--eval-images", "5"]  # They do not split over two devices.
        train.main([*SMALL, *flags, "--devices", devices, "--out", str(out)])
        logs.append(_log(out))
        statistics.append(_checkpoint(out, 2)["statistics"])
    for one, two in zip(*logs, strict=True):
        values = lambda row: [float(x or 0) for x in row.values()]
        np.testing.assert_allclose(values(two), values(one), rtol=1e-3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *statistics)
    means = [x for x in jax.tree.leaves(statistics[0]) if not (x == 1).all()]
    assert any((x != 0).any() for x in means)  # Batch norm has learned.


def test_measure_searches_a_rate_for_other_seeds(tmp_path, monkeypatch, capsys):
    made = []

    def run(config, *_):
        made.append((config.method, config.learning_rate, config.seed))
        folder = pathlib.Path(config.out)
        folder.mkdir(parents=True)
        l1 = config.seed + abs(config.learning_rate - 4e-3)
        folder.joinpath("results.json").write_text(json.dumps({"l1": l1, "ssim": 0.5}))
        folder.joinpath("log.csv").write_text("step,cosine\n1,-0.5\n2,0.5\n")

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(measure, "prepare", lambda config: ())
    flags = ["--data", "x.npz", "--out", str(tmp_path), "--rows", "PCGrad, exact"]
    measure.main(flags)
    search = [("pcgrad", float(rate), 0) for rate in measure.RATES]
    assert made[:8] == [*search, *(("pcgrad", 4e-3, seed) for seed in (1, 2, 3))]
    assert len(made) == 16  # As many for the sum, to compare with.
    cells = ["0.004", "2.000 ± 1.000", "+0.000 ± 0.000", "0.500 ± 0.000"]
    row = " | ".join(["| PCGrad, exact", *cells, "+0.000 ± 0.000", "50 % |"])
    assert row in capsys.readouterr().out
    measure.main([*flags, "--figure"])
    assert len(made) == 16  # None is repeated.
    assert (tmp_path / "differences.png").stat().st_size > 0


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install"):
        runs.tensorboard(tmp_path, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_scikit_image(channels):
    rng = np.random.default_rng(0)
    a = rng.random((2, 16, 16, channels)).astype(np.float32)
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1).astype(np.float32)
    ours = model.ssim(jnp.asarray(a), jnp.asarray(b))
    for i in range(2):
        _, picture = structural_similarity(
            a[i],
            b[i],
            gaussian_weights=True,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
            full=True,
        )
        inner = picture[5:-5, 5:-5]  # Where the window of 11 pixels fits.
        assert float(ours[i]) == pytest.approx(float(inner.mean()), abs=1e-5)


@pytest.mark.parametrize("side, window", [(8, 7), (9, 9)])
def test_ssim_with_a_smaller_window(side, window):
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.random((2, 5, side, side, 3)), jnp.float32)
    expected = dm_pix.ssim(a, b, filter_size=window)
    np.testing.assert_allclose(model.ssim(a, b), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_by_shifts(stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 5, 1, 3)), jnp.float32)
    strides, padding = (stride, stride), [(2, 2), (2, 2)]
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    ours = model._shift_and_add(x, kernel, strides, padding)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_patches_and_back():
    images = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    patches = model.to_patches(images, 4)
    assert patches.shape == (2, 4, 48)
    np.testing.assert_array_equal(patches[0, 1].reshape(4, 4, 3), images[0, :4, 4:])
    np.testing.assert_array_equal(model.from_patches(patches, 8, 4), images)


# Parameters without the classifier of 1000 classes: torchvision's 2,542,856 and, for
# ConvNeXt-V2, the authors' 28,635,496.
@pytest.mark.parametrize(
    "name, encoder, count",
    [
        ("mobilenet_v3_small", model.MobileNetEncoder, 2_542_856 - 590_848 - 1_025_000),
        ("convnext_v2_tiny", model.ConvNeXtEncoder, 28_635_496 - 769_000),
    ],
)
def test_published_encoders_have_their_size(name, encoder, count):
    preset = model.ENCODERS[name]
    make = lambda: encoder(preset, 3, jnp.float32, nnx.Rngs(0))
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert preset.patch == 32


def test_the_stride_of_an_encoder_is_its_patch():
    config = config_lib.parse(["--encoder", "mobilenet_v3_small", "--image-size", "64"])

    def encode(images):
        statistics = np.zeros(3), np.ones(3)
        network = model.MaskedAutoencoder(config, 3, 2, *statistics, nnx.Rngs(0))
        return network(images, jnp.ones((1, 4), bool))

    patches, pooled = jax.eval_shape(encode, jnp.zeros((1, 64, 64, 3)))
    assert patches.shape == (1, 4, 32 * 32 * 3) and pooled.shape == (1, 576)


def test_photos_that_ship_with_the_libraries():
    images = data.load(config_lib.parse(["--image-size", "64"]))
    assert images.train.dtype == np.uint8 and images.train.shape[1:] == (64, 64, 3)
    assert len(images.train) + len(images.valid) > 300 and images.num_classes == 6
    config = config_lib.parse(["--batch-size", "8"])
    first, again = (data.draw(images, 7, 4, config) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.noise != data.draw(images, 8, 4, config).noise).any()


def test_a_folder_of_images(tmp_path):
    from PIL import Image

    for name, value in {"a/1.png": 10, "a/2.jpg": 20, "b/3.png": 200}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (value,) * 3).save(tmp_path / name)
    arguments = ["--image-folder", str(tmp_path), "--image-size", "16"]
    config = config_lib.parse(
        [*arguments, "--valid-share", "0.4", "--batch-size", "2"]
        + ["--micro-batches", "2"]
    )
    images = data.load(config)
    assert images.train[:].shape == (2, 16, 16, 3) and len(images.valid) == 1
    again = images.train[np.array([1, 0, 1])]
    np.testing.assert_array_equal(again, images.train[:][[1, 0, 1]])
    assert images.channels == 3 and images.statistics()[0].shape == (3,)
    for batch in (data.draw(images, 1, 4, config), *data.validation(images, 4, config)):
        assert batch.images.dtype == np.uint8 and len(batch.images) == len(batch.labels)
    brightness = images.train[:].mean((1, 2, 3))
    np.testing.assert_array_equal(images.train_labels, brightness > 100)

    # Without folders in it there are no classes.
    photos = [*arguments[:1], str(tmp_path / "a"), "--valid-share", "0.5"]
    photos += ["--batch-size", "1", "--micro-batches", "1", "--method", "sum"]
    assert data.load(config_lib.parse(photos)).num_classes == 1
    (tmp_path / "a" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="not an image"):
        data.Photos(np.array([tmp_path / "a" / "1.png"]), 16)[:1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mask-ratio", "0.01"], "hides none or all"),
        (["--image-size", "20"], "multiple of the patch of convnext_micro, 8"),
        (["--devices", "64"], "there are only"),
        (["--batch-size", "100000"], "more than the .* images"),
    ],
)
def test_bad_settings(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main([*arguments, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_bad_data(tmp_path):
    load = lambda *flags: data.load(config_lib.parse(list(flags)))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load("--data", str(tmp_path / "none.npz"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load("--image-folder", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no images"):
        load("--image-folder", str(tmp_path))
    file = tmp_path / "bad.npz"
    for arrays, message in (
        ({"z": np.zeros(3)}, r"has \['z'\], but none of"),
        ({"x": np.zeros((9, 8, 8))}, r"in uint8 .* found float64 \(9, 8, 8\)"),
        ({"x": np.zeros((9, 8), np.uint8)}, "of shape"),
        ({"x": np.zeros((9, 8, 8), np.uint8), "y": np.zeros(3)}, "one label for each"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=message):
            load("--data", str(file))
    whole = file.read_bytes()
    for broken in (b"not an archive", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="not an NPZ file"):
            load("--data", str(file))
    np.savez(file, x=np.zeros((20, 8, 8), np.uint8))
    few = ["--image-size", "8", "--batch-size", "9", "--micro-batches", "3"]
    with pytest.raises(ValueError, match="all images have the same label"):
        load("--data", str(file), *few, "--third-task", "classification")
