"""Stage 0 of category discovery: views, pretraining, weights of the examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx

from examples import arrays, runs
from examples.gcd import data, model, pretrain, train, weights
from examples.gcd.config import Config, parse
from examples.ssl import model as ssl_model

DIGITS = jnp.asarray(data.load("digits")[0][:64])
FLAGS = [
    *("--preset", "mlp", "--max-images", "150", "--batch-size", "16"),
    *("--pretrain", "ssl", "--pretrain-epochs", "3", "--pretrain-batch-size", "32"),
    *("--warp", "1", "--strokes", "1", "--epochs", "1", "--reference-epochs", "0"),
]


def views(**settings):
    view = jax.jit(lambda key: data.view(key, DIGITS, Config(jitter=0.0, **settings)))
    shown = lambda x: np.asarray((x + 1) / 2)  # As in [0, 1].
    return shown(view(jax.random.key(0))), shown(view(jax.random.key(1)))


def test_warped_views_are_the_same_digit():
    """They differ, keep their ink within the promised stretch, and stay in [0, 1]."""
    first, second = views(warp=1.0)
    assert (np.abs(first - second).max((1, 2, 3)) > 0.1).all()
    assert first.min() >= 0 and first.max() <= 1
    ink = lambda x: x.mean()  # Areas grow and shrink by up to exp(0.2)**2.
    assert np.exp(-0.4) < ink(first) / ink(np.asarray(DIGITS) / 255) < np.exp(0.4)


def test_a_weak_warp_is_the_shift_alone():
    shifted, _ = views()
    warped, _ = views(warp=1e-5)
    np.testing.assert_allclose(warped, shifted, atol=1e-3)


def test_strokes_stay_between_erosion_and_dilation():
    """Of the same shifted images, by SciPy."""
    shifted, _ = views()
    drawn, _ = views(strokes=1.0)
    size = (1, 3, 3, 1)
    assert (drawn <= scipy.ndimage.grey_dilation(shifted, size) + 1e-5).all()
    assert (drawn >= scipy.ndimage.grey_erosion(shifted, size) - 1e-5).all()
    change = (drawn - shifted).mean((1, 2, 3))
    assert (change > 0.02).any() and (change < -0.02).any()


def test_a_flat_convnet_knows_places():
    """And its last block, the only one that trains on request, is the one that does."""
    preset = model.PRESETS["lenet"]
    backbone = model.make_backbone(preset, (8, 8, 1), jnp.float32, nnx.Rngs(0))
    x = data.plain(DIGITS[:4])
    assert jnp.abs(backbone(x) - backbone(jnp.roll(x, 4, 1))).max() > 0.1
    assert isinstance(backbone.blocks[preset.depth - 1], model.Places)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of all stages."""
    out = tmp_path_factory.mktemp("gcd") / "run"
    return out, train.main([*FLAGS, "--out", str(out)])


def test_pretraining_learns_and_is_kept(pretrained):
    out, results = pretrained
    assert 0 <= results["all"] <= 1
    losses = [row["contrast"] for row in runs.read(out / "pretraining.csv")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    config = parse([*FLAGS[:6], "--backbone-weights", str(out / "pretrained.npz")])
    split, _ = train.prepare(config)
    assert split.images.shape[-1] == 1  # What was pretrained on grey images reads them.
    backbone = train.make_reference(config, split).backbone
    kept = arrays.load("", out / "pretrained.npz")
    np.testing.assert_array_equal(backbone.norm.bias[...], kept["norm.bias"])
    assert np.abs(kept["norm.bias"]).max() > 0  # It starts at zero.


def test_interrupted_pretraining_goes_on_bit_for_bit(pretrained, tmp_path, monkeypatch):
    whole, _ = pretrained
    out = tmp_path / "run"
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)

    def interrupt(text):
        if "epoch 2" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main([*FLAGS, "--out", str(out)])
    with pytest.raises(FileExistsError, match=r"checkpoint 2.*--resume"):
        train.main([*FLAGS, "--out", str(out)])
    monkeypatch.setattr(train, "train_reference", interrupt_reference)
    with pytest.raises(KeyboardInterrupt):
        train.main([*FLAGS, "--out", str(out), "--resume"])
    assert (out / "pretraining.csv").read_text() == (
        whole / "pretraining.csv"
    ).read_text()
    jax.tree.map(
        np.testing.assert_array_equal,
        arrays.load("", out / "pretrained.npz"),
        arrays.load("", whole / "pretrained.npz"),
    )


def interrupt_reference(*_):
    raise KeyboardInterrupt


def test_too_few_images_for_a_batch(tmp_path):
    with pytest.raises(ValueError, match="256 is more than the 150 images"):
        train.main([*FLAGS, "--pretrain-batch-size", "256", "--out", str(tmp_path)])


@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_an_encoder_of_the_other_example(channels, tmp_path):
    """They are those of its own model, which normalises images in its own way."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 16, 16, channels), np.uint8)
    mean, deviation = rng.uniform(0.2, 0.6, (2, channels))
    sizes = ssl_model.ENCODERS["convnext_micro"]
    encoder = ssl_model.ConvNeXtEncoder(sizes, channels, jnp.float32, nnx.Rngs(3))
    tensors = arrays.by_name(nnx.state(encoder))
    statistics = np.stack([mean, deviation])
    arrays.save(tmp_path / "encoder.npz", tensors | {"statistics": statistics})
    file = str(tmp_path / "encoder.npz")
    assert weights.channels(file) == channels

    preset = model.PRESETS["convnext_micro"]
    backbone = model.make_backbone(preset, (16, 16, channels), jnp.float32, nnx.Rngs(0))
    assert len(backbone.blocks) == preset.depth
    weights.load(backbone, file)
    normalised = ((images / 255 - mean) / deviation).astype(np.float32)
    expected = encoder(normalised, train=False).mean((1, 2))
    np.testing.assert_allclose(backbone(data.plain(images)), expected, atol=2e-5)


def test_weights_of_another_preset(pretrained):
    preset = model.PRESETS["convnet"]
    backbone = model.make_backbone(preset, (8, 8, 1), jnp.float32, nnx.Rngs(0))
    with pytest.raises(ValueError, match="is missing: choose the --preset"):
        weights.load(backbone, str(pretrained[0] / "pretrained.npz"))
