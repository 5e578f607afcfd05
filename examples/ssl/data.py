"""Images: patches of natural photos by default, a file or a folder on request."""

import concurrent.futures
import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from examples import arrays
from examples.flags import UserError
from examples.ssl.config import Config

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class Photos:
    """Image files as an array of squares, each of them read when it is asked for."""

    def __init__(self, files: np.ndarray, size: int, memory: int = 4 * 2**30):
        self.files, self.size = files, size
        # Those read last stay in memory, as far as they fit.
        read = functools.lru_cache(maxsize=memory // (3 * size**2))
        self._read = read(self._read_file)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self._read, self.files[rows])))

    def _read_file(self, file):
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as image:
                return np.array(ImageOps.fit(image.convert("RGB"), (self.size,) * 2))
        except (OSError, SyntaxError) as error:
            raise UserError(f"--image-folder: {file} is not an image") from error


class Images(NamedTuple):
    """Training and validation images, uint8 of shape `(N, H, W, C)`."""

    train: np.ndarray | Photos
    valid: np.ndarray | Photos
    train_labels: np.ndarray
    valid_labels: np.ndarray

    @property
    def channels(self) -> int:
        return self.train[:1].shape[-1]

    @property
    def num_classes(self) -> int:
        return int(max(self.train_labels.max(), self.valid_labels.max())) + 1

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel in [0, 1]."""
        pixels = self.train[:1000] / 255
        return pixels.mean((0, 1, 2)), pixels.std((0, 1, 2)) + 1e-3


class Batch(NamedTuple):
    """What a training step needs to know, drawn on the host."""

    images: np.ndarray  # Of shape `(B, H, W, C)`, uint8.
    labels: np.ndarray  # Of shape `(B,)`.
    noise: np.ndarray  # Its order masks patches, shape `(B, 2, num_patches)`.
    seeds: np.ndarray  # For dropout, shape `(micro_batches,)`.


def load(config: Config) -> Images:
    """Loads the images that the configuration asks for, and splits them."""
    if config.data:
        images, labels = _load_file(pathlib.Path(config.data))
        images = _resize(images, config.image_size)
    elif config.image_folder:
        images, labels = _find_photos(pathlib.Path(config.image_folder))
    else:
        images, labels = _cut_photos(config.image_size)
    order = np.random.default_rng(0).permutation(len(images))
    order = order[: config.max_images or None]
    num_valid = round(config.valid_share * len(order))
    if not 0 < num_valid < len(order):
        raise UserError(
            f"--valid-share {config.valid_share} of {len(order)} images leaves none "
            "to train or none to validate on"
        )
    valid, train = order[:num_valid], order[num_valid:]
    if len(train) < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {len(train)} images "
            "to train on"
        )
    parts = images[train], images[valid]
    if config.image_folder:
        parts = tuple(Photos(files, config.image_size) for files in parts)
    if config.third_task == "classification" and labels.max() == 0:
        raise UserError("--third-task classification: all images have the same label")
    return Images(*parts, labels[train], labels[valid])


def draw(images: Images, step: int, num_patches: int, config: Config) -> Batch:
    """The batch of a step: a function of seed and step, so that runs resume."""
    rng = np.random.default_rng((config.seed, step))
    rows = rng.choice(len(images.train), config.batch_size, replace=False)
    pixels = images.train[rows]
    flip = rng.random(len(rows)) < 0.5
    pixels = np.where(flip[:, None, None, None], pixels[:, :, ::-1], pixels)
    return Batch(
        images=pixels,
        labels=images.train_labels[rows],
        noise=rng.random((len(rows), 2, num_patches), np.float32),
        seeds=rng.integers(2**31, size=config.micro_batches, dtype=np.int32),
    )


def validation(images: Images, num_patches: int, config: Config) -> Iterator[Batch]:
    """Batches of validation images, with the same masks for every run."""
    rng = np.random.default_rng(0)
    count = min(config.eval_images, len(images.valid))
    size = min(config.batch_size, count)
    for start in range(0, count - size + 1, size):
        rows = slice(start, start + size)
        yield Batch(
            images=images.valid[rows],
            labels=images.valid_labels[rows],
            noise=rng.random((size, 2, num_patches), np.float32),
            seeds=np.zeros(config.micro_batches, np.int32),
        )


def _cut_photos(size):
    """Patches of the photos that come with scikit-learn and scikit-image."""
    from skimage import data as skimage_data
    from sklearn.datasets import load_sample_images

    photos = [
        skimage_data.astronaut(),
        skimage_data.cat(),
        skimage_data.coffee(),
        skimage_data.rocket(),
        *load_sample_images().images,
    ]
    if size > min(min(photo.shape[:2]) for photo in photos):
        raise UserError(f"--image-size {size} is larger than a photo")
    patches, labels = [], []
    for label, photo in enumerate(photos):
        rows, columns = photo.shape[0] // size, photo.shape[1] // size
        photo = photo[: rows * size, : columns * size]
        photo = photo.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        patches.append(photo.reshape(-1, size, size, 3))
        labels += [label] * (rows * columns)
    return np.concatenate(patches), np.array(labels, np.int32)


def _load_file(path):
    found = arrays.load("--data", path)
    images = arrays.first_of(("x", "x_train", "images"), found, "--data", path)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"--data {path}: expected images in uint8 and of shape (N, H, W) or "
            f"(N, H, W, C), found {images.dtype} {images.shape}"
        )
    if images.ndim == 3:
        images = images[..., None]
    label = next((x for x in ("y", "y_train", "label", "labels") if x in found), None)
    labels = found[label] if label else np.zeros(len(images), np.int32)
    if labels.shape != (len(images),):
        raise UserError(
            f"--data {path}: expected one label for each of the {len(images)} images "
            f"in {label}, found shape {labels.shape}"
        )
    _, labels = np.unique(labels, return_inverse=True)
    return images, labels.astype(np.int32)


def _find_photos(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"--image-folder {folder}: no such folder")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(f"--image-folder {folder}: no images in it")
    classes = [str(file.relative_to(folder).parent.parts[:1]) for file in files]
    _, labels = np.unique(classes, return_inverse=True)
    return np.array(files, object), labels.astype(np.int32)


def _resize(images, size):
    if images.shape[1:3] == (size, size):
        return images
    resize = jax.jit(
        lambda x: jax.image.resize(x, (len(x), size, size, x.shape[-1]), "linear")
    )
    parts = np.array_split(images, max(len(images) // 500, 1))
    resized = [np.asarray(resize(part.astype(np.float32))) for part in parts]
    return np.concatenate(resized).round().astype(np.uint8)
