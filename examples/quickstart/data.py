"""MultiDigits: two real handwritten digits overlaid on one canvas."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples import arrays
from examples.flags import UserError


class Digits(NamedTuple):
    """Single digits."""

    images: jax.Array  # Shape `(n, height, width)`, from 0 to 1.
    labels: jax.Array  # Shape `(n,)`.


class Batch(NamedTuple):
    """Pairs of digits."""

    images: jax.Array  # Canvases, shape `(n, height, width, 1)`.
    left: jax.Array  # Label of the digit at the top left, shape `(n,)`.
    right: jax.Array  # Label of the digit at the bottom right, shape `(n,)`.


def load(path: str = "") -> tuple[Digits, Digits]:
    """Training and test digits: scikit-learn's 8x8 scans, or those of a file.

    Args:
      path: an .npz file with x_train, y_train, x_test and y_test, such as MNIST.
    """
    if path:
        found = arrays.load("--data", path)
        train, test = (_checked(found, part, path) for part in ("train", "test"))
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images = digits.images[order].astype(np.float32) / 16
        labels = digits.target[order]
        train, test = (images[:1297], labels[:1297]), (images[1297:], labels[1297:])
    to_digits = lambda x, y: Digits(jnp.asarray(x), jnp.asarray(y, jnp.int32))
    return to_digits(*train), to_digits(*test)


def _checked(found, part, path):
    """Images from 0 to 1 and labels of one part of a file."""
    names = f"x_{part}", f"y_{part}"
    images, labels = (arrays.first_of([name], found, "--data", path) for name in names)
    square = images.ndim == 3 and images.shape[1] == images.shape[2]
    if not square or images.dtype != np.uint8:
        raise UserError(
            f"--data {path}: expected {names[0]} in uint8 and of shape (N, size, "
            f"size), found {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or not np.isin(labels, range(10)).all():
        raise UserError(
            f"--data {path}: expected a digit from 0 to 9 for each of the "
            f"{len(images)} images in {names[1]}"
        )
    return images / np.float32(255), labels


@functools.partial(jax.jit, static_argnames="size")
def sample(key: jax.Array, digits: Digits, size: int) -> Batch:
    """Overlays ``size`` random pairs, shifted apart by half a digit."""
    shift = digits.images.shape[1] // 2
    i, j = jax.random.randint(key, (2, size), 0, len(digits.labels))

    top_left = jnp.pad(digits.images[i], ((0, 0), (0, shift), (0, shift)))
    bottom_right = jnp.pad(digits.images[j], ((0, 0), (shift, 0), (shift, 0)))
    images = jnp.maximum(top_left, bottom_right)[..., None]
    return Batch(images, digits.labels[i], digits.labels[j])
