"""A shared convolutional trunk, one head per task, and the three losses."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.quickstart import data

TASKS = ("left", "right", "draw")


def flatten(x: jax.Array) -> jax.Array:
    """Makes one vector of each image."""
    return x.reshape(len(x), -1)


class Model(nnx.Module):
    """Describes a canvas by a few features, and reads all tasks from those."""

    def __init__(self, height: int, features: int, *, rngs: nnx.Rngs):
        size = -(-height // 4)  # Two strides of 2, rounded up.
        self.trunk = nnx.Sequential(
            nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs),
            nnx.relu,
            nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs),
            nnx.relu,
            flatten,
            nnx.Linear(size * size * 32, features, rngs=rngs),
            nnx.tanh,
        )
        self.heads = nnx.Dict(
            left=nnx.Linear(features, 10, rngs=rngs),
            right=nnx.Linear(features, 10, rngs=rngs),
            draw=nnx.Linear(features, height * height, rngs=rngs),
        )

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Returns the output of each head."""
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


def unexplained(drawn: jax.Array, images: jax.Array) -> jax.Array:
    """Squared error of drawings, as a share of the variance of the images."""
    images = flatten(images)
    return jnp.mean((drawn - images) ** 2) / jnp.var(images, axis=0).mean()


def losses(model: Model, batch: data.Batch) -> jax.Array:
    """The losses of the three tasks, in the order of TASKS.

    To read a digit, the features should say what it is and nothing else; to draw
    the canvas, what it looks like. A handful of features cannot say both, so the
    third task conflicts with the other two, and those compete for the rest.
    """
    out = model(batch.images)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.stack(
        [
            cross_entropy(out["left"], batch.left).mean(),
            cross_entropy(out["right"], batch.right).mean(),
            unexplained(out["draw"], batch.images),
        ]
    )


def scores(model: Model, batch: data.Batch) -> jax.Array:
    """Accuracy of both readings and variance explained, in per cent."""
    out = model(batch.images)
    return 100 * jnp.stack(
        [
            (out["left"].argmax(-1) == batch.left).mean(),
            (out["right"].argmax(-1) == batch.right).mean(),
            1 - unexplained(out["draw"], batch.images),
        ]
    )
