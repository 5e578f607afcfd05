"""A masked autoencoder with a convolutional encoder, and its losses."""

from collections.abc import Callable
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.flags import UserError
from examples.ssl.config import Config
from examples.ssl.data import Batch, Images


class MobileNet(NamedTuple):
    """Rows of MobileNetV3: kernel, expansion, width, squeeze, hard swish, stride."""

    stem: int
    rows: tuple[tuple[int, int, int, bool, bool, int], ...]
    width: int

    @property
    def patch(self) -> int:
        return 2 * int(np.prod([row[-1] for row in self.rows]))


class ConvNeXt(NamedTuple):
    """Widths and depths of the stages of ConvNeXt-V2, and stride of its stem."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem: int = 4
    kernel: int = 7
    stem_norm: bool = True  # Without it, small ones see how bright a patch is.

    @property
    def width(self) -> int:
        return self.widths[-1]

    @property
    def patch(self) -> int:
        return self.stem * 2 ** (len(self.widths) - 1)


# The side of a patch, which is masked as a whole, is the stride of the encoder.
ENCODERS: dict[str, MobileNet | ConvNeXt] = {
    "mobilenet_v3_tiny": MobileNet(
        stem=16,
        rows=(
            (3, 32, 16, True, False, 2),
            (3, 48, 24, False, True, 2),
            (5, 72, 24, True, True, 1),
        ),
        width=64,
    ),
    "mobilenet_v3_small": MobileNet(
        stem=16,
        rows=(
            (3, 16, 16, True, False, 2),
            (3, 72, 24, False, False, 2),
            (3, 88, 24, False, False, 1),
            (5, 96, 40, True, True, 2),
            (5, 240, 40, True, True, 1),
            (5, 240, 40, True, True, 1),
            (5, 120, 48, True, True, 1),
            (5, 144, 48, True, True, 1),
            (5, 288, 96, True, True, 2),
            (5, 576, 96, True, True, 1),
            (5, 576, 96, True, True, 1),
        ),
        width=576,
    ),
    "convnext_micro": ConvNeXt((24, 48), (1, 2), stem_norm=False),
    "convnext_mini": ConvNeXt((48, 96), (2, 6), stem_norm=False),
    "convnext_v2_tiny": ConvNeXt((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_v2_base": ConvNeXt((128, 256, 512, 1024), (3, 3, 27, 3)),
}


class MaskedAutoencoder(nnx.Module):
    """Reconstructs the patches of an image that it does not see."""

    def __init__(
        self,
        config: Config,
        channels: int,
        num_classes: int,
        mean: np.ndarray,
        std: np.ndarray,
        rngs: nnx.Rngs,
    ):
        preset = ENCODERS[config.encoder]
        dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
        self.patch = preset.patch
        self.num_masked = num_masked(config)
        self.third_task = config.third_task
        self.statistics = (tuple(mean.tolist()), tuple(std.tolist()))
        encoder = MobileNetEncoder if isinstance(preset, MobileNet) else ConvNeXtEncoder
        self.encoder = encoder(preset, channels, dtype, rngs)
        self.decoder = _Decoder(config, preset, channels, dtype, rngs)
        outputs = {"contrastive": 64, "classification": num_classes}
        if config.third_task in outputs:
            size = outputs[config.third_task]
            self.head = nnx.Linear(preset.width, size, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        mask: jax.Array,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts all patches of normalised images.

        Args:
          images: of shape `(B, H, W, C)`.
          mask: which patches are hidden, shape `(B, num_patches)`.
          train: whether batch norm and dropout are as in training.
          key: for dropout.

        Returns:
          Patches, shape `(B, num_patches, patch**2 * C)`, and pooled features.
        """
        side = images.shape[1] // self.patch
        grid = mask.reshape(-1, side, side, 1)
        hidden = grid.repeat(self.patch, 1).repeat(self.patch, 2)
        features = self.encoder(jnp.where(hidden, 0, images), train)
        tokens = features.reshape(len(images), -1, features.shape[-1])
        seen = ~mask[..., None]
        pooled = jnp.sum(tokens * seen, axis=1) / jnp.sum(seen, axis=1)
        patches = self.decoder(tokens, mask, train, key)
        return patches.astype(jnp.float32), pooled.astype(jnp.float32)

    def losses(self, batch: Batch, train: bool) -> dict[str, jax.Array]:
        """The loss of each task, without its weight."""
        pixels, images, mean, std = self._normalize(batch)
        key = jax.random.key(batch.seeds[0]) if train else None
        order = jnp.argsort(batch.noise[:, 0], axis=1)
        patches, pooled = self(images, self._mask(order), train, key)

        # The two spaces are those of the paper: L1 where pixels are normalised,
        # SSIM where they are in [0, 1].
        hidden = order[:, : self.num_masked, None]
        pick = lambda x: jnp.take_along_axis(x, hidden, axis=1)
        predicted, target = pick(patches), pick(to_patches(images, self.patch))
        losses = {"l1": jnp.abs(predicted - target).mean()}
        shape = (-1, self.patch, self.patch, pixels.shape[-1])
        in_pixels = lambda x: x.reshape(shape) * std + mean
        similarity = ssim(in_pixels(predicted), in_pixels(target))
        losses["ssim"] = 1 - similarity.mean()

        if self.third_task == "classification":
            scores = optax.softmax_cross_entropy_with_integer_labels(
                self.head(pooled), batch.labels
            )
            losses["classification"] = scores.mean()
        elif self.third_task == "contrastive":
            other = self._mask(jnp.argsort(batch.noise[:, 1], axis=1))
            views = self.head(pooled), self.head(self(images, other, train, key)[1])
            losses["contrastive"] = contrastive_loss(*views)
        return losses

    def reconstruct(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images in [0, 1] of a batch: what the model sees, makes, and should make."""
        pixels, images, mean, std = self._normalize(batch)
        mask = self._mask(jnp.argsort(batch.noise[:, 0], axis=1))
        patches, _ = self(images, mask)
        predicted = from_patches(patches, images.shape[1], self.patch)
        predicted = to_patches(predicted * std + mean, self.patch)
        original, hidden = to_patches(pixels, self.patch), mask[..., None]
        whole = lambda x: from_patches(x, images.shape[1], self.patch)
        seen = jnp.where(hidden, 0.5, original)
        return whole(seen), whole(jnp.where(hidden, predicted, original)), pixels

    def _normalize(self, batch):
        mean, std = (jnp.array(x).reshape(1, 1, 1, -1) for x in self.statistics)
        pixels = batch.images.astype(jnp.float32) / 255
        return pixels, (pixels - mean) / std, mean, std

    def _mask(self, order):
        rows = jnp.arange(len(order))[:, None]
        mask = jnp.zeros(order.shape, bool)
        return mask.at[rows, order[:, : self.num_masked]].set(True)


def maker(config: Config, images: Images) -> Callable[[jax.Array], MaskedAutoencoder]:
    """A function that makes a new model of the images from a random key."""
    settings = (config, images.channels, images.num_classes, *images.statistics())
    return nnx.jit(lambda key: MaskedAutoencoder(*settings, nnx.Rngs(key)))


def num_patches(config: Config) -> int:
    """Number of patches in an image; raises ValueError if they do not fit."""
    if config.encoder not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise UserError(f"--encoder {config.encoder}: known are {known}")
    patch = ENCODERS[config.encoder].patch
    if config.image_size % patch:
        raise UserError(
            f"--image-size {config.image_size}: expected a multiple of the patch of "
            f"{config.encoder}, {patch} pixels"
        )
    return (config.image_size // patch) ** 2


def num_masked(config: Config) -> int:
    """Number of hidden patches: at least one, and at least one is seen."""
    count = num_patches(config)
    masked = round(config.mask_ratio * count)
    if not 0 < masked < count:
        raise UserError(
            f"--mask-ratio {config.mask_ratio} of {count} patches hides none or all"
        )
    return masked


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """Images `(B, H, W, C)` as patches `(B, num_patches, patch**2 * C)`."""
    size, height, width, channels = images.shape
    shape = (size, height // patch, patch, width // patch, patch, channels)
    return images.reshape(shape).swapaxes(2, 3).reshape(size, -1, patch**2 * channels)


def from_patches(patches: jax.Array, side: int, patch: int) -> jax.Array:
    """The inverse of :func:`to_patches` for square images."""
    size, channels = len(patches), patches.shape[-1] // patch**2
    shape = (size, side // patch, side // patch, patch, patch, channels)
    return patches.reshape(shape).swapaxes(2, 3).reshape(size, side, side, channels)


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of images `(B, H, W, C)` in [0, 1], one number each.

    The window is Gaussian, of 11 pixels, or the largest odd size that fits.
    """
    side = a.shape[1]
    size = min(11, side - 1 + side % 2)
    centers = jnp.arange(size // 2, side - size // 2)[:, None]
    offsets = jnp.arange(side)[None] - centers
    inside = jnp.abs(offsets) <= size // 2
    window = jnp.where(inside, jnp.exp(-0.5 * (offsets / 1.5) ** 2), 0)
    window = window / window.sum(1, keepdims=True)
    # Two products with a band matrix: faster than dm_pix's own convolutions.
    blur = lambda x: jnp.einsum("ih,jw,bhwc->bijc", window, window, x)
    return dm_pix.ssim(a, b, filter_fn=blur)


def contrastive_loss(a: jax.Array, b: jax.Array, temperature: float = 0.2) -> jax.Array:
    """InfoNCE between two views `(B, D)` of each image, in both directions."""
    a, b = (x / optax.safe_norm(x, 1e-6, axis=1, keepdims=True) for x in (a, b))
    scores = a @ b.T / temperature
    labels = jnp.arange(len(a))
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return (entropy(scores, labels) + entropy(scores.T, labels)).mean() / 2


def _conv(width, out, kernel, stride, depthwise, use_bias, dtype, rngs):
    if kernel == stride == 1:
        return nnx.Linear(width, out, use_bias=use_bias, dtype=dtype, rngs=rngs)
    by_shifts = depthwise and jax.default_backend() == "cpu"
    return nnx.Conv(
        width,
        out,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        feature_group_count=width if depthwise else 1,
        conv_general_dilated=_shift_and_add
        if by_shifts
        else jax.lax.conv_general_dilated,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
    )


def _shift_and_add(x, kernel, strides, padding, **_):
    """A depthwise convolution; XLA's own is several times slower on a CPU."""
    (down, right), (height, width) = strides, kernel.shape[:2]
    rows, columns = x.shape[1] // down, x.shape[2] // right
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    shifted = lambda i, j: x[
        :, i : i + down * rows : down, j : j + right * columns : right
    ]
    return sum(
        shifted(i, j) * kernel[i, j, 0].reshape(1, 1, 1, -1)
        for i in range(height)
        for j in range(width)
    )


class MobileNetEncoder(nnx.Module):
    """Features of the patches of an image, shape `(B, rows, columns, width)`."""

    def __init__(self, preset, channels, dtype, rngs):
        self.stem = _ConvNorm(channels, preset.stem, 3, 2, False, dtype, rngs)
        width, blocks = preset.stem, []
        for kernel, expanded, out, squeeze, swish, stride in preset.rows:
            activation = jax.nn.hard_swish if swish else jax.nn.relu
            blocks.append(
                _InvertedResidual(
                    (width, expanded, out),
                    kernel,
                    stride,
                    squeeze,
                    activation,
                    dtype,
                    rngs,
                )
            )
            width = out
        self.blocks = nnx.List(blocks)
        self.last = _ConvNorm(width, preset.width, 1, 1, False, dtype, rngs)

    def __call__(self, x, train):
        x = jax.nn.hard_swish(self.stem(x, train))
        for block in self.blocks:
            x = block(x, train)
        return jax.nn.hard_swish(self.last(x, train))


class _InvertedResidual(nnx.Module):
    def __init__(self, widths, kernel, stride, squeeze, activation, dtype, rngs):
        width, expanded, out = widths
        self.activation = activation
        self.skip = stride == 1 and width == out
        norm = lambda *sizes: _ConvNorm(*sizes, dtype, rngs)
        wider = expanded != width
        self.expand = norm(width, expanded, 1, 1, False) if wider else None
        self.depthwise = norm(expanded, expanded, kernel, stride, True)
        self.squeeze = _Squeeze(expanded, dtype, rngs) if squeeze else None
        self.project = norm(expanded, out, 1, 1, False)

    def __call__(self, x, train):
        y = x if self.expand is None else self.activation(self.expand(x, train))
        y = self.activation(self.depthwise(y, train))
        if self.squeeze is not None:
            y = self.squeeze(y)
        y = self.project(y, train)
        return x + y if self.skip else y


class _ConvNorm(nnx.Module):
    def __init__(self, width, out, kernel, stride, depthwise, dtype, rngs):
        self.conv = _conv(width, out, kernel, stride, depthwise, False, dtype, rngs)
        self.norm = nnx.BatchNorm(out, momentum=0.9, dtype=dtype, rngs=rngs)

    def __call__(self, x, train):
        return self.norm(self.conv(x), use_running_average=not train)


class _Squeeze(nnx.Module):
    """Squeeze and excitation: a gate for each channel."""

    def __init__(self, width, dtype, rngs):
        quarter = max((width // 4 + 4) // 8 * 8, 8)  # The nearest multiple of 8.
        self.reduce = nnx.Linear(width, quarter, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(quarter, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        gate = jax.nn.relu(self.reduce(x.mean((1, 2), keepdims=True)))
        return x * jax.nn.hard_sigmoid(self.expand(gate))


class ConvNeXtEncoder(nnx.Module):
    """Features of the patches of an image, shape `(B, rows, columns, width)`."""

    def __init__(self, preset, channels, dtype, rngs):
        layers, width, stride = [], channels, preset.stem
        for out, depth in zip(preset.widths, preset.depths, strict=True):
            norm = lambda size: nnx.LayerNorm(size, dtype=dtype, rngs=rngs)
            before = [norm(width)] if layers else []
            after = [norm(out)] if preset.stem_norm and not layers else []
            layers += [*before, _Downsample(width, out, stride, dtype, rngs), *after]
            layers += [
                _ConvNeXtBlock(out, preset.kernel, dtype, rngs) for _ in range(depth)
            ]
            width, stride = out, 2
        self.layers = nnx.List(layers)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x, train):
        del train
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class _Downsample(nnx.Module):
    """A convolution whose kernel is as large as its stride."""

    def __init__(self, width, out, stride, dtype, rngs):
        self.stride = stride
        self.linear = nnx.Linear(stride**2 * width, out, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        size, height, width, _ = x.shape
        patches = self.linear(to_patches(x, self.stride))
        return patches.reshape(size, height // self.stride, width // self.stride, -1)


class _ConvNeXtBlock(nnx.Module):
    def __init__(self, width, kernel, dtype, rngs):
        self.depthwise = _conv(width, width, kernel, 1, True, True, dtype, rngs)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(4 * width))
        self.bias = nnx.Param(jnp.zeros(4 * width))
        self.project = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        y = jax.nn.gelu(self.expand(self.norm(self.depthwise(x))))
        # Global response normalisation: channels compete for the image.
        norms = optax.safe_norm(y.astype(jnp.float32), 1e-6, axis=(1, 2), keepdims=True)
        response = (norms / norms.mean(-1, keepdims=True)).astype(y.dtype)
        wide = lambda p: p[...].astype(y.dtype).reshape(1, 1, 1, -1)
        y = y + wide(self.scale) * (y * response) + wide(self.bias)
        return x + self.project(y)


class _Decoder(nnx.Module):
    """A light transformer over all patches."""

    def __init__(self, config, preset, channels, dtype, rngs):
        width = config.decoder_width
        self.embed = nnx.Linear(preset.width, width, dtype=dtype, rngs=rngs)
        normal = lambda *shape: nnx.Param(0.02 * rngs.params.normal(shape))
        self.masked = normal(1, 1, width)
        self.position = normal(1, num_patches(config), width)
        self.blocks = nnx.List(
            [_Block(config, dtype, rngs) for _ in range(config.decoder_depth)]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.predict = nnx.Linear(width, preset.patch**2 * channels, rngs=rngs)

    def __call__(self, tokens, mask, train, key):
        x = self.embed(tokens)
        as_tokens = lambda p: p[...].astype(x.dtype)
        x = jnp.where(mask[..., None], as_tokens(self.masked), x)
        x = x + as_tokens(self.position)
        for i, block in enumerate(self.blocks):
            x = block(x, train, None if key is None else jax.random.fold_in(key, i))
        return self.predict(self.norm(x))


class _Block(nnx.Module):
    def __init__(self, config, dtype, rngs):
        width = config.decoder_width
        norm = lambda: nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        linear = lambda a, b: nnx.Linear(a, b, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = norm(), norm()
        self.attention = nnx.MultiHeadAttention(
            config.decoder_heads, width, decode=False, dtype=dtype, rngs=rngs
        )
        self.expand, self.project = linear(width, 4 * width), linear(4 * width, width)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x, train, key):
        x = x + self.attention(self.norm1(x))
        y = self.project(jax.nn.gelu(self.expand(self.norm2(x))))
        return x + self.dropout(y, deterministic=not train, rngs=key)
