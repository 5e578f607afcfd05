"""MultiDigits: two real handwritten digits overlaid on one canvas."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
        with np.load(path) as file:
            train = file["x_train"] / np.float32(255), file["y_train"]
            test = file["x_test"] / np.float32(255), file["y_test"]
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images = digits.images[order].astype(np.float32) / 16
        labels = digits.target[order]
        train, test = (images[:1297], labels[:1297]), (images[1297:], labels[1297:])
    to_digits = lambda x, y: Digits(jnp.asarray(x), jnp.asarray(y, jnp.int32))
    return to_digits(*train), to_digits(*test)


@functools.partial(jax.jit, static_argnames="size")
def sample(key: jax.Array, digits: Digits, size: int) -> Batch:
    """Overlays ``size`` random pairs, shifted apart by half a digit."""
    shift = digits.images.shape[1] // 2
    i, j = jax.random.randint(key, (2, size), 0, len(digits.labels))

    top_left = jnp.pad(digits.images[i], ((0, 0), (0, shift), (0, shift)))
    bottom_right = jnp.pad(digits.images[j], ((0, 0), (shift, 0), (shift, 0)))
    images = jnp.maximum(top_left, bottom_right)[..., None]
    return Batch(images, digits.labels[i], digits.labels[j])
