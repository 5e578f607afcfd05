"""The self-supervised example end to end, in miniature."""

import csv
import json

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from examples.ssl import config as config_lib
from examples.ssl import data, model, train

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


@pytest.fixture(autouse=True)
def tiny_encoders(monkeypatch):
    mobile = model.MobileNet(stem=4, rows=((3, 8, 8, True, True, 2),), width=8)
    convnext = model.ConvNeXt(widths=(4,), depths=(1,), kernel=3)
    monkeypatch.setitem(model.ENCODERS, "mobile", mobile)
    monkeypatch.setitem(model.ENCODERS, "convnext", convnext)


def _log(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _checkpoint(folder, step):
    files = sorted((folder / "checkpoints" / str(step)).rglob("*"))
    assert files
    manager = train.ocp.StandardCheckpointer()
    return manager.restore((folder / "checkpoints" / str(step) / "default").absolute())


def test_stochastic_gcond_resumes_bit_for_bit(file, tmp_path, monkeypatch):
    arguments = [*SMALL, "--data", file, "--encoder", "convnext"]
    arguments += ["--decoder-depth", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train.main([*arguments, "--out", str(whole)])
    assert 0 < results["l1"] < 3 and 0 < results["ssim"] < 2
    for name in ("curves.png", "reconstructions.png", "results.json"):
        assert (whole / name).stat().st_size > 0

    # Interrupted at step 3, after the checkpoint of step 2.
    draw = data.draw

    def interrupted(images, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return draw(images, step, *rest)

    monkeypatch.setattr(data, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*arguments, "--out", str(parts)])
    monkeypatch.setattr(data, "draw", draw)
    with pytest.raises(FileExistsError, match="step 2: continue it with --resume"):
        train.main([*arguments, "--out", str(parts)])
    with pytest.raises(ValueError, match="method 'gcond', not 'pcgrad'"):
        train.main([*arguments, "--out", str(parts), "--resume", "--method", "pcgrad"])
    train.main([*arguments, "--out", str(parts), "--resume"])
    assert _log(parts) == _log(whole)
    jax.tree.map(
        np.testing.assert_array_equal, _checkpoint(parts, 4), _checkpoint(whole, 4)
    )

    rows = _log(whole)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert {"l1", "ssim", "cosine", "conflicts", "winner"} < rows[0].keys()
    assert rows[1]["valid_ssim"] and not rows[0]["valid_ssim"]


def test_exact_mode_with_a_third_task_and_batch_norm(file, tmp_path):
    results = train.main(
        [
            *SMALL,
            *("--data", file, "--encoder", "mobile", "--method", "cagrad"),
            *("--mode", "exact", "--third-task", "contrastive", "--steps", "2"),
            *("--momentum", "0", "--dropout", "0.1", "--bfloat16"),
            *("--out", str(tmp_path)),
        ]
    )
    assert results.keys() == {"contrastive", "l1", "ssim", "images_per_second"}
    statistics = _checkpoint(tmp_path, 2)["statistics"]
    means = [x for x in jax.tree.leaves(statistics) if not (x == 1).all()]
    assert any((x != 0).any() for x in means)  # Batch norm has learned.


def test_the_sum_on_two_devices_is_the_sum_on_one(file, tmp_path):
    results = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        arguments = ["--data", file, "--encoder", "convnext", "--method", "sum"]
        train.main(
            [*SMALL, *arguments, "--devices", devices, "--steps", "2"]
            + ["--out", str(out)]
        )
        results.append(json.loads((out / "results.json").read_text()))
    one, two = results
    assert one["l1"] == pytest.approx(two["l1"], rel=1e-3)
    assert one["ssim"] == pytest.approx(two["ssim"], rel=1e-3)


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


def test_full_size_encoders_have_the_stride_of_their_patch():
    for name, patch in {"mobilenet_v3_small": 32, "convnext_v2_base": 32}.items():
        assert model.ENCODERS[name].patch == patch
    config = config_lib.parse(["--encoder", "mobilenet_v3_small", "--image-size", "64"])

    def encode(images):
        network = model.MaskedAutoencoder(config, 3, 2, np.zeros(3), np.ones(3))
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
    assert images.train.shape == (2, 16, 16, 3) and images.valid.shape[0] == 1
    brightness = images.train.mean((1, 2, 3))
    np.testing.assert_array_equal(images.train_labels, brightness > 100)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mask-ratio", "1"], "--mask-ratio 1.0: expected between 0 and 1"),
        (["--mask-ratio", "0"], "between 0 and 1"),
        (["--mask-ratio", "0.01"], "hides none or all"),
        (["--image-size", "20"], "multiple of the patch of convnext_atto, 8"),
        (["--encoder", "resnet"], "known are mobilenet_v3_tiny"),
        (["--method", "pgrad"], "there is no method 'pgrad'"),
        (["--mode", "random"], "exact or stochastic"),
        (["--micro-batches", "3"], "does not split"),
        (
            ["--third-task", "contrastive", "--batch-size", "128"],
            "multiples of the 3 tasks",
        ),
        (["--devices", "64"], "there are only"),
        (["--batch-size", "100000"], "more than the .* images"),
        (["--warmup-steps", "500"], "fewer than --steps"),
        (["--data", "a.npz", "--image-folder", "b"], "not both"),
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
        ({"z": np.zeros(3)}, r"expected images in x, found \['z'\]"),
        ({"x": np.zeros((9, 8, 8))}, r"in uint8 .* found float64 \(9, 8, 8\)"),
        ({"x": np.zeros((9, 8), np.uint8)}, "of shape"),
        ({"x": np.zeros((9, 8, 8), np.uint8), "y": np.zeros(3)}, "one label for each"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=message):
            load("--data", str(file))
    file.write_text("not an archive")
    with pytest.raises(ValueError, match="not an NPZ file"):
        load("--data", str(file))
