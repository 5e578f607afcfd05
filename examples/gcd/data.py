"""Images, the split of category discovery, batches and views on the device."""

import functools
import pathlib
import pickle
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn import datasets

from examples import arrays
from examples.flags import UserError
from examples.gcd.config import Config

IMAGE_KEYS = ("x", "x_train", "images")
LABEL_KEYS = ("y", "label", "y_train", "labels")
# Mean and standard deviation, by number of channels: those of ImageNet for colour.
NORMALIZATION = {
    1: ([0.5], [0.5]),
    3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


class Split(NamedTuple):
    """Images of known and novel classes, of which some known ones are labelled."""

    images: np.ndarray  # Shape (N, height, width, channels), uint8.
    labels: np.ndarray  # Shape (N,), int32; known classes come first.
    labelled: np.ndarray  # Rows of the labelled images.
    unlabelled: np.ndarray  # Rows of all other images, known and novel.
    num_known: int
    num_classes: int

    @property
    def novel(self) -> np.ndarray:
        """Rows of the images of novel classes."""
        return np.flatnonzero(self.labels >= self.num_known)


def load(source: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, height, width, channels), uint8, and labels (N,) of a data set.

    Args:
      source: `digits`, an npz file with images (`x`, `x_train` or `images`) and
        labels (`y`, `label`, `y_train` or `labels`), or a folder with the training
        batches of CIFAR-10 or CIFAR-100 as Python pickles. Pickles can run code:
        only open files that you trust.
    """
    path = pathlib.Path(source)
    if source == "digits":
        digits = datasets.load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels = digits.target
    elif path.is_dir():
        images, labels = _load_cifar(path)
    else:
        found = arrays.load("--data", path)
        images = arrays.first_of(IMAGE_KEYS, found, "--data", path)
        labels = arrays.first_of(LABEL_KEYS, found, "--data", path)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in NORMALIZATION:
        raise UserError(
            f"--data {source}: images have the shape {images.shape}, but must be "
            "(N, height, width) or (N, height, width, 1 or 3)"
        )
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"--data {source}: {len(images)} images, but labels of shape {labels.shape}"
        )
    if images.dtype != np.uint8:
        raise UserError(f"--data {source}: images are {images.dtype}, not uint8")
    return images, labels


def make_split(images: np.ndarray, labels: np.ndarray, config: Config) -> Split:
    """Draws the labelled set; the draw is fixed by the seed."""
    rng = np.random.default_rng(config.seed)
    names, labels = np.unique(labels, return_inverse=True)
    num_classes = config.max_classes or len(names)
    num_known = config.known or num_classes // 2
    if num_classes > len(names) or num_known > num_classes:
        raise UserError(
            f"--known {num_known} --max-classes {num_classes}, but the data have "
            f"{len(names)} classes"
        )
    rows = np.flatnonzero(labels < num_classes)
    if config.max_images:
        rows = np.sort(rng.permutation(rows)[: config.max_images])
    images, labels = images[rows], labels[rows].astype(np.int32)

    known = np.flatnonzero(labels < num_known)
    num_labelled = int(config.labelled_share * len(known))
    labelled = np.sort(rng.permutation(known)[:num_labelled])
    unlabelled = np.setdiff1d(np.arange(len(labels)), labelled)
    if len(labelled) == 0 or len(known) == len(labels):
        raise UserError(
            f"--known {num_known} of {num_classes} classes and --labelled-share "
            f"{config.labelled_share} of their {len(known)} images leave "
            f"{len(labelled)} labelled images and {len(labels) - len(known)} of novel "
            "classes: both are needed"
        )
    return Split(
        images=_resize(images, config.image_size),
        labels=labels,
        labelled=labelled,
        unlabelled=unlabelled,
        num_known=num_known,
        num_classes=num_classes,
    )


def draw(
    key: jax.Array, labelled: jax.Array, unlabelled: jax.Array, batch_size: int
) -> jax.Array:
    """Rows of a batch, with replacement: half of it is labelled in expectation."""
    choice, first, second = jax.random.split(key, 3)
    shape = (batch_size,)
    return jnp.where(
        jax.random.bernoulli(choice, shape=shape),
        labelled[jax.random.randint(first, shape, 0, len(labelled))],
        unlabelled[jax.random.randint(second, shape, 0, len(unlabelled))],
    )


def in_epochs(
    key: jax.Array, rows: jax.Array, number: jax.Array, batch_size: int
) -> jax.Array:
    """Rows of the batch of a step, in an order that is drawn anew in each epoch."""
    steps = len(rows) // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, number // steps), rows)
    return jax.lax.dynamic_slice_in_dim(order, number % steps * batch_size, batch_size)


def view(key: jax.Array, images: jax.Array, config: Config) -> jax.Array:
    """One random view of each image, normalised."""
    size = images.shape[1:]
    pad = max(1, size[0] // 8)

    def one(key, image):
        crop, mirror, brightness, contrast, form, width = jax.random.split(key, 6)
        image = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        image = dm_pix.random_crop(crop, image, size)
        if config.warp:
            image = _warp(form, image, config.warp)
        if config.strokes:
            image = _thicken(width, image, config.strokes)
        if config.flip:
            image = dm_pix.random_flip_left_right(mirror, image)
        if config.jitter:
            low, high = 1 - config.jitter, 1 + config.jitter
            image = dm_pix.random_brightness(brightness, image, config.jitter)
            image = dm_pix.random_contrast(contrast, image, low, high)
        return image

    images = jax.vmap(one)(jax.random.split(key, len(images)), images / 255)
    return _normalize(jnp.clip(images, 0, 1))


def two_views(key: jax.Array, images: jax.Array, config: Config) -> jax.Array:
    """All first views, then all second views."""
    return jnp.concatenate([view(k, images, config) for k in jax.random.split(key)])


def _warp(key, image, strength):
    """Turns, stretches and shears an image, and bends it smoothly.

    At strength 1 by up to 15 degrees, 20 % and a slope of 0.2, and by a 25th of its
    size. dm_pix does so, too, 75 times slower.
    """
    keys = jax.random.split(key, 4)
    draw = lambda key, *shape: strength * jax.random.uniform(key, shape, minval=-1)
    angle = jnp.pi / 12 * draw(keys[0])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[cos, -sin], [sin, cos]])
    shear = jnp.array([[1, 0.2 * draw(keys[1])], [0, 1]])
    stretch = jnp.diag(jnp.exp(0.2 * draw(keys[2], 2)))
    size = image.shape[:2]
    center = (jnp.array(size).reshape(2, 1, 1) - 1) / 2
    places = (
        jnp.einsum("ij,jhw->ihw", turn @ shear @ stretch, jnp.indices(size) - center)
        + center
    )
    bends = strength * size[0] / 25 * jax.random.normal(keys[3], (2, 5, 5))
    places = places + jax.image.resize(bends, (2, *size), "cubic")
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, order=1, mode="nearest"
    )
    return jax.vmap(lambda channel: sample(channel, list(places)), -1, -1)(image)


def _thicken(key, image, strength):
    """Mixes an image with its brightest or darkest neighbours: strokes grow or thin."""
    share = jax.random.uniform(key, (), minval=-strength, maxval=strength)
    brightest = nnx.max_pool(image, (3, 3), padding="SAME")
    darkest = nnx.min_pool(image, (3, 3), padding="SAME")
    extreme = jnp.where(share > 0, brightest, darkest)
    return image + jnp.abs(share) * (extreme - image)


def plain(images: jax.Array) -> jax.Array:
    """The view for evaluation: the image as it is."""
    return _normalize(images / 255)


def _normalize(images):
    mean, deviation = NORMALIZATION[images.shape[-1]]
    shape = (1, 1, 1, -1)
    return (images - jnp.reshape(jnp.array(mean), shape)) / jnp.reshape(
        jnp.array(deviation), shape
    )


def _resize(images, size):
    if not size or images.shape[1:3] == (size, size):
        return images
    resize = jax.jit(
        jax.vmap(
            lambda image: jax.image.resize(
                image, (size, size, image.shape[-1]), "cubic"
            )
        )
    )
    parts = [
        np.asarray(resize(images[i : i + 256].astype(np.float32)))
        for i in range(0, len(images), 256)
    ]
    return np.rint(np.clip(np.concatenate(parts), 0, 255)).astype(np.uint8)


def _load_cifar(folder):
    batches = sorted(folder.glob("data_batch_*")) or sorted(folder.glob("train"))
    if not batches:
        raise FileNotFoundError(
            f"--data {folder}: found neither data_batch_* (CIFAR-10) nor train "
            "(CIFAR-100)"
        )
    images, labels = [], []
    for path in batches:
        with path.open("rb") as file:
            try:
                batch = pickle.load(file, encoding="bytes")
            except (pickle.UnpicklingError, EOFError, ValueError, KeyError):
                raise UserError(f"--data {path}: not a pickle of CIFAR") from None
        images.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.extend(batch.get(b"fine_labels") or batch[b"labels"])
    return np.concatenate(images), np.array(labels)
