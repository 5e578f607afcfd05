"""Files of backbone weights: those of DINO and DINOv2, and of the examples."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples import arrays
from examples.flags import UserError
from examples.gcd.data import NORMALIZATION
from examples.gcd.model import ViT


def save(file: pathlib.Path, backbone: nnx.Module, channels: int) -> None:
    """Writes the weights of a backbone that learned images of so many channels."""
    weights = arrays.by_name(nnx.state(backbone))
    arrays.save(file, weights | {"statistics": np.array(NORMALIZATION[channels])})


def channels(file: str) -> int:
    """Of the images that the backbone saw."""
    statistics = _read(file).get("statistics", np.zeros((2, 3)))  # DINO saw colour.
    return statistics.shape[-1]


def load(backbone: nnx.Module, file: str) -> None:
    """Fills a backbone.

    Args:
      backbone: the model to fill; the position table of a ViT is resized to its grid.
      file: of DINO or DINOv2, in the original or Hugging Face layout, `.safetensors`
        or `.npz` with the same names; or what this example's pretraining writes, or
        the `encoder.npz` of examples.ssl.

    Raises:
      ValueError: naming the tensor that is missing, left over or of another shape.
    """
    tensors = _read(file)
    if "statistics" in tensors:
        tensors = _of_examples(tensors)
        source = lambda path: (".".join(map(str, path)), lambda tensor: tensor)
    elif isinstance(backbone, ViT):
        tensors, source = _to_original_layout(tensors), _source
    else:
        raise UserError(
            f"{file}: weights are for a ViT, not a {type(backbone).__name__}"
        )
    filled = []
    for path, value in nnx.to_flat_state(nnx.state(backbone, nnx.Param)):
        name, convert = source(path)
        if name not in tensors:
            raise UserError(
                f"{file}: the tensor {name} is missing: choose the --preset of these "
                "weights"
            )
        tensor = convert(np.asarray(tensors.pop(name), np.float32))
        if name == "pos_embed":
            tensor = _resize_positions(tensor, value.shape[1])
        if tensor.shape != value.shape:
            raise UserError(
                f"{file}: {name} becomes {tensor.shape}, but the model needs "
                f"{value.shape}: choose the --preset of these weights"
            )
        filled.append((path, value.replace(jnp.asarray(tensor))))
    if tensors:
        raise UserError(
            f"{file}: the model has no place for {', '.join(sorted(tensors)[:5])}"
        )
    nnx.update(backbone, nnx.from_flat_state(filled))


def _read(file):
    suffix = pathlib.Path(file).suffix
    if suffix == ".npz":
        return arrays.load("--backbone-weights", file)
    if suffix != ".safetensors":
        raise UserError(f"--backbone-weights {file}: .safetensors or .npz is expected")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(
            f"--backbone-weights {file}: not a safetensors file ({error})"
        ) from error


def _of_examples(tensors):
    """Weights of an example, for images that are normalised as here.

    What learned images with other statistics has a linear layer of patches first,
    which can take up the difference.
    """
    tensors = {re.sub("^layers", "blocks", name): x for name, x in tensors.items()}
    mean, deviation = tensors.pop("statistics")
    our_mean, our_deviation = np.array(NORMALIZATION[len(mean)])
    first = "blocks.0.linear.kernel"
    if first in tensors:
        kernel = tensors[first]
        by_channel = kernel.reshape(-1, len(mean), kernel.shape[-1])
        shift = np.einsum("pci,c->i", by_channel, (our_mean - mean) / deviation)
        scaled = by_channel * (our_deviation / deviation)[:, None]
        bias = tensors["blocks.0.linear.bias"] + shift
        tensors |= {first: scaled.reshape(kernel.shape), "blocks.0.linear.bias": bias}
    return tensors


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
