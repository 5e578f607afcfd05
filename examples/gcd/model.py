"""Vision transformer, ConvNets or MLP with the heads of SimGCD, in Flax NNX."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.flags import UserError
from examples.ssl.model import ENCODERS, ConvNeXtEncoder


class Preset(NamedTuple):
    """Sizes of a backbone and of its heads."""

    trunk: str  # A name in TRUNKS.
    width: int
    depth: int
    patch: int = 0  # Of a ViT, as the number of heads.
    num_heads: int = 0
    layer_scale: bool = False
    pooled: bool = True  # Whether a ConvNet averages over places.
    encoder: str = ""  # Of examples.ssl.
    hidden: int = 2048  # Of the projector.
    projection: int = 256


PRESETS = {
    "tiny": Preset("vit", 64, 2, 4, 4, hidden=128, projection=64),  # For 8 x 8,
    "mini": Preset("vit", 96, 2, 7, 4, hidden=256, projection=64),  # 28 x 28,
    "small": Preset("vit", 128, 4, 8, 4, hidden=512, projection=128),  # 32 to 64.
    "convnet": Preset("convnet", 64, 3, hidden=256, projection=64),  # For any size.
    # Its last block knows places: for 28 to 64 pixels, where pretraining needs them.
    "lenet": Preset("convnet", 64, 4, pooled=False, hidden=256, projection=64),
    "convnext_micro": Preset(
        "convnext", 48, 6, encoder="convnext_micro", hidden=256, projection=64
    ),
    "convnext_mini": Preset(
        "convnext", 96, 11, encoder="convnext_mini", hidden=512, projection=128
    ),
    "mlp": Preset("mlp", 64, 2, hidden=128, projection=64),  # The fastest.
    "vit_s16": Preset("vit", 384, 12, 16, 6),  # DINO, for 224 x 224.
    "vit_b16": Preset("vit", 768, 12, 16, 12),
    "vit_s14": Preset("vit", 384, 12, 14, 6, layer_scale=True),  # DINOv2.
    "vit_b14": Preset("vit", 768, 12, 14, 12, layer_scale=True),
}

_trunc_normal = nnx.initializers.truncated_normal(0.02)


class Attention(nnx.Module):
    def __init__(self, width: int, num_heads: int, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = _linear(width, 3 * width, dtype, rngs)
        self.proj = _linear(width, width, dtype, rngs)

    def __call__(self, x):
        shape = (*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(shape), 2, 0)
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, width: int, hidden: int, dtype, rngs: nnx.Rngs):
        self.fc1 = _linear(width, hidden, dtype, rngs)
        self.fc2 = _linear(hidden, width, dtype, rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class LayerScale(nnx.Module):
    def __init__(self, width: int):
        self.gamma = nnx.Param(jnp.full((width,), 1e-5))

    def __call__(self, x):
        return x * self.gamma.astype(x.dtype)[None, None]


class Block(nnx.Module):
    """Transformer block; names are those of DINO's weights files."""

    def __init__(self, preset: Preset, dtype, rngs: nnx.Rngs):
        width = preset.width
        self.norm1 = _norm(width, dtype, rngs)
        self.attn = Attention(width, preset.num_heads, dtype, rngs)
        self.norm2 = _norm(width, dtype, rngs)
        self.mlp = MLP(width, 4 * width, dtype, rngs)
        if preset.layer_scale:
            self.ls1, self.ls2 = LayerScale(width), LayerScale(width)
        else:
            self.ls1 = self.ls2 = lambda x: x

    def __call__(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nnx.Module):
    """Feature of an image: the class token after the final LayerNorm."""

    def __init__(self, preset: Preset, shape, dtype, rngs: nnx.Rngs):
        height, width, channels = shape
        if height % preset.patch or width % preset.patch:
            raise UserError(
                f"images of {height} x {width} do not divide into patches of "
                f"{preset.patch}: choose another --preset or set --image-size"
            )
        self.patch = preset.patch
        num_patches = (height // preset.patch) * (width // preset.patch)
        self.patch_embed = _linear(
            preset.patch**2 * channels, preset.width, dtype, rngs
        )
        self.cls_token = nnx.Param(_trunc_normal(rngs.params(), (1, 1, preset.width)))
        self.pos_embed = nnx.Param(
            _trunc_normal(rngs.params(), (1, 1 + num_patches, preset.width))
        )
        self.blocks = nnx.List(
            [Block(preset, dtype, rngs) for _ in range(preset.depth)]
        )
        self.norm = _norm(preset.width, dtype, rngs)

    def __call__(self, images):
        n, height, width, channels = images.shape
        p = self.patch
        x = images.reshape(n, height // p, p, width // p, p, channels)
        x = x.swapaxes(2, 3).reshape(n, -1, p * p * channels)
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.cls_token[...], (n, 1, x.shape[-1]))
        x = jnp.concatenate([token.astype(x.dtype), x], 1)
        x = x + self.pos_embed.astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]).astype(jnp.float32)


class ConvBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        self.norm = _norm(outputs, dtype, rngs)

    def __call__(self, x):
        return nnx.gelu(self.norm(self.conv(x)))


class Places(nnx.Module):
    """A linear layer of all places."""

    def __init__(self, inputs: int, outputs: int, dtype, rngs: nnx.Rngs):
        self.linear = _linear(inputs, outputs, dtype, rngs)

    def __call__(self, x):
        return self.linear(x.reshape(len(x), 1, 1, -1))


class ConvNet(nnx.Module):
    """Feature of an image: the average over places, or of all places, normalised."""

    def __init__(self, preset: Preset, shape, dtype, rngs: nnx.Rngs):
        depth = preset.depth - (not preset.pooled)
        widths = [preset.width // 2**i for i in reversed(range(depth))]
        pairs = zip([shape[-1], *widths[:-1]], widths)
        blocks = [ConvBlock(*pair, dtype, rngs) for pair in pairs]
        if not preset.pooled:
            places = math.prod(-(-size // 2**depth) for size in shape[:2])
            blocks += [Places(places * widths[-1], preset.width, dtype, rngs)]
        self.blocks = nnx.List(blocks)
        self.norm = _norm(preset.width, dtype, rngs)

    def __call__(self, images):
        x = images
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean((1, 2))).astype(jnp.float32)


class ConvNeXt(nnx.Module):
    """Feature of an image: the average over places of an encoder of examples.ssl."""

    def __init__(self, preset: Preset, shape, dtype, rngs: nnx.Rngs):
        sizes = ENCODERS[preset.encoder]
        if shape[0] % sizes.patch or shape[1] % sizes.patch:
            raise UserError(
                f"images of {shape[0]} x {shape[1]} do not divide into the patches of "
                f"{preset.encoder}: set --image-size to a multiple of {sizes.patch}"
            )
        encoder = ConvNeXtEncoder(sizes, shape[-1], dtype, rngs)
        self.blocks, self.norm = encoder.layers, encoder.norm

    def __call__(self, images):
        x = images
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean((1, 2)).astype(jnp.float32)


class Dense(nnx.Module):
    def __init__(self, inputs: int, outputs: int, dtype, rngs: nnx.Rngs):
        self.linear = _linear(inputs, outputs, dtype, rngs)

    def __call__(self, x):
        return self.linear(nnx.gelu(x))


class MLPNet(nnx.Module):
    """Feature of an image from its pixels, through layers of 4 widths and 1."""

    def __init__(self, preset: Preset, shape, dtype, rngs: nnx.Rngs):
        widths = [4 * preset.width] * (preset.depth - 1) + [preset.width]
        self.stem = _linear(math.prod(shape), 4 * preset.width, dtype, rngs)
        self.blocks = nnx.List(
            [
                Dense(*pair, dtype, rngs)
                for pair in zip([4 * preset.width, *widths], widths)
            ]
        )
        self.norm = _norm(preset.width, dtype, rngs)

    def __call__(self, images):
        x = self.stem(images.reshape(len(images), -1))
        for block in self.blocks:
            x = block(x)
        return self.norm(x).astype(jnp.float32)


TRUNKS = {"vit": ViT, "convnet": ConvNet, "convnext": ConvNeXt, "mlp": MLPNet}


class CosineClassifier(nnx.Module):
    """Cosines to one prototype per class: weight normalisation, gain fixed at 1."""

    def __init__(self, width: int, num_classes: int, rngs: nnx.Rngs):
        bound = width**-0.5
        self.prototypes = nnx.Param(
            jax.random.uniform(rngs.params(), (num_classes, width), jnp.float32)
            * (2 * bound)
            - bound
        )

    def __call__(self, x):
        return normalize(x) @ normalize(self.prototypes[...]).T


class SimGCD(nnx.Module):
    """Backbone, one more layer with ReLU, and the two heads that read it."""

    def __init__(self, preset: Preset, shape, num_classes: int, dtype, seed: int):
        rngs = nnx.Rngs(seed)
        width = preset.width
        self.backbone = make_backbone(preset, shape, dtype, rngs)
        self.neck = _linear(width, width, jnp.float32, rngs)
        self.classifier = CosineClassifier(width, num_classes, rngs)
        sizes = [width, preset.hidden, preset.hidden, preset.projection]
        self.projector = nnx.List(
            [_linear(a, b, jnp.float32, rngs) for a, b in itertools.pairwise(sizes)]
        )

    def heads(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Class cosines and projections of features."""
        x = nnx.relu(self.neck(z))
        logits = self.classifier(x)
        for layer in self.projector[:-1]:
            x = nnx.gelu(layer(x), approximate=False)
        return logits, self.projector[-1](x)


class Reference(nnx.Module):
    """Backbone and classifier of the known classes."""

    def __init__(self, preset: Preset, shape, num_known: int, dtype, seed: int):
        rngs = nnx.Rngs(seed)
        self.backbone = make_backbone(preset, shape, dtype, rngs)
        self.classifier = CosineClassifier(preset.width, num_known, rngs)


def make_backbone(preset: Preset, shape, dtype, rngs: nnx.Rngs) -> nnx.Module:
    """An untrained backbone for images of a shape."""
    return TRUNKS[preset.trunk](preset, shape, dtype, rngs)


def is_trainable(path: tuple, trainable: str, depth: int) -> bool:
    """Heads always train; of the backbone all, or the last block only."""
    in_last_block = path[:3] == ("backbone", "blocks", depth - 1)
    return path[0] != "backbone" or trainable == "all" or in_last_block


def normalize(x: jax.Array) -> jax.Array:
    """Rows of length one; a zero row stays zero, with a finite gradient."""
    norm2 = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(norm2 == 0, 1, norm2))


def _linear(inputs, outputs, dtype, rngs):
    return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)


def _norm(width, dtype, rngs):
    return nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
