"""Vision transformer, ConvNet or MLP with the heads of SimGCD, in Flax NNX."""

import itertools
import math
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples import arrays
from examples.flags import UserError


class Preset(NamedTuple):
    """Sizes of a backbone and of its heads."""

    trunk: str  # vit, convnet or mlp.
    width: int
    depth: int
    patch: int = 0  # Of a ViT, as the number of heads.
    num_heads: int = 0
    layer_scale: bool = False
    hidden: int = 2048  # Of the projector.
    projection: int = 256


PRESETS = {
    "tiny": Preset("vit", 64, 2, 4, 4, hidden=128, projection=64),  # For 8 x 8,
    "mini": Preset("vit", 96, 2, 7, 4, hidden=256, projection=64),  # 28 x 28,
    "small": Preset("vit", 128, 4, 8, 4, hidden=512, projection=128),  # 32 to 64.
    "convnet": Preset("convnet", 64, 3, hidden=256, projection=64),  # For any size.
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


class ConvNet(nnx.Module):
    """Feature of an image: the average over places, normalised."""

    def __init__(self, preset: Preset, shape, dtype, rngs: nnx.Rngs):
        widths = [preset.width // 2**i for i in reversed(range(preset.depth))]
        pairs = zip([shape[-1], *widths[:-1]], widths)
        self.blocks = nnx.List([ConvBlock(*pair, dtype, rngs) for pair in pairs])
        self.norm = _norm(preset.width, dtype, rngs)

    def __call__(self, images):
        x = images
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean((1, 2))).astype(jnp.float32)


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


TRUNKS = {"vit": ViT, "convnet": ConvNet, "mlp": MLPNet}


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


def load_backbone_weights(backbone: ViT, file: str) -> None:
    """Fills a ViT with DINO or DINOv2 weights, of the original or Hugging Face layout.

    Args:
      backbone: the model to fill; the position table is resized to its grid.
      file: `.safetensors`, or `.npz` with the same names.

    Raises:
      ValueError: naming the tensor that is missing, left over or of another shape.
    """
    suffix = pathlib.Path(file).suffix
    if suffix == ".npz":
        tensors = arrays.load("--backbone-weights", file)
    elif suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise UserError(
                f"--backbone-weights {file}: not a safetensors file ({error})"
            ) from error
    else:
        raise UserError(f"--backbone-weights {file}: .safetensors or .npz is expected")
    if not isinstance(backbone, ViT):
        raise UserError(
            f"{file}: weights are for a ViT, not a {type(backbone).__name__}"
        )

    tensors = _to_original_layout(tensors)
    params = nnx.state(backbone, nnx.Param)
    filled = []
    for path_, value in nnx.to_flat_state(params):
        name, convert = _source(path_)
        if name not in tensors:
            raise UserError(f"{file}: the tensor {name} is missing")
        tensor = convert(np.asarray(tensors.pop(name), np.float32))
        if name == "pos_embed":
            tensor = _resize_positions(tensor, value.shape[1])
        if tensor.shape != value.shape:
            raise UserError(
                f"{file}: {name} becomes {tensor.shape}, but the model needs "
                f"{value.shape}: choose the --preset of these weights"
            )
        filled.append((path_, value.replace(jnp.asarray(tensor))))
    if tensors:
        raise UserError(
            f"{file}: the model has no place for {', '.join(sorted(tensors)[:5])}"
        )
    nnx.update(backbone, nnx.from_flat_state(filled))


# From the names of Hugging Face (ViTModel, Dinov2Model) to DINO's own, in this order.
_RENAMES = [
    (r"^(module|model|backbone|vit|dinov2)\.", ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"attention\.attention\.(query|key|value)", r"attn.\1"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
_UNUSED = re.compile(r"^(mask_token$|head\.|pooler\.)")


def _to_original_layout(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if not _UNUSED.match(name):
            renamed[name] = tensor
    for name in [name for name in renamed if "attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            joined = np.concatenate([renamed.pop(part) for part in parts])
            renamed[name.replace("query", "qkv")] = joined
    return renamed


def _source(path):
    """Name of a parameter in the file, and how to convert it."""
    name = ".".join(map(str, path))
    if name == "patch_embed.kernel":  # From (width, channels, patch, patch).
        flatten = lambda t: t.transpose(2, 3, 1, 0).reshape(-1, len(t))
        return "patch_embed.proj.weight", flatten
    if name.endswith(".kernel"):
        return name.removesuffix("kernel") + "weight", np.transpose
    name = name.replace("patch_embed.", "patch_embed.proj.")
    return re.sub(r"\.scale$", ".weight", name), lambda t: t


def _resize_positions(table, num_tokens):
    """Bicubic resizing of the position table, apart from the class token's row."""
    if table.shape[1] == num_tokens:
        return table
    old, new = (round((n - 1) ** 0.5) for n in (table.shape[1], num_tokens))
    if new**2 + 1 != num_tokens or old**2 + 1 != table.shape[1]:
        raise UserError(
            f"pos_embed has {table.shape[1]} rows and the model needs {num_tokens}: "
            "both must be a square grid and the class token"
        )
    grid = table[:, 1:].reshape(1, old, old, -1)
    grid = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "cubic")
    return np.concatenate([table[:, :1], grid.reshape(1, new**2, -1)], 1)


def _linear(inputs, outputs, dtype, rngs):
    return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)


def _norm(width, dtype, rngs):
    return nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
