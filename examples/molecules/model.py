"""A trunk that all tasks share and a linear head for each; losses and scores."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.molecules.config import Config
from examples.molecules.data import Molecules, Rows

FEW = 20  # So many tasks are reported each by itself, more of them by their mean.


class Model(nnx.Module):
    """Layers that all tasks share, and one output for each task."""

    def __init__(self, inputs: int, tasks: int, config: Config, *, rngs: nnx.Rngs):
        widths = [inputs, *[config.width] * config.depth]
        pairs = itertools.pairwise(widths)
        self.trunk = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in pairs])
        self.heads = nnx.Linear(config.width, tasks, rngs=rngs)  # Column i: task i.

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Standardised properties, or logits, of shape `(batch, tasks)`."""
        x = inputs.astype(jnp.float32)  # Fingerprints are bits.
        for layer in self.trunk:
            x = nnx.silu(layer(x))
        return self.heads(x)


def shared(path: str) -> bool:
    """Whether all tasks share a parameter, so that their gradients may conflict."""
    return "trunk" in path


class Problem(NamedTuple):
    """The model as functions of its parameters."""

    init: Callable[[jax.Array], Any]  # From a key to parameters.
    losses: Callable[[Any, Rows], jax.Array]  # One for each task.
    scores: Callable[[Any, Rows], jax.Array]  # MAE or AUC of each task.


def make_problem(config: Config, molecules: Molecules) -> Problem:
    """Makes the functions of a run."""
    sizes = molecules.train.inputs.shape[1], len(molecules.tasks)
    make = lambda key: Model(*sizes, config, rngs=nnx.Rngs(key))
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))
    predict = lambda params, rows: nnx.merge(graph, params)(rows.inputs)
    spread = molecules.spread

    def losses(params, batch):
        out = predict(params, batch)
        if spread is None:
            errors = optax.losses.sigmoid_binary_cross_entropy(out, batch.targets)
        else:
            errors = (out - batch.targets) ** 2
        found = masked_mean(errors, batch.mask)
        # Outputs have the size of their targets either way, losses their unit or none.
        in_units = spread is not None and not config.standardise
        return found * spread**2 if in_units else found

    def scores(params, rows):
        out = predict(params, rows)
        if spread is None:
            return jax.vmap(auc, in_axes=1)(out, rows.targets, rows.mask)
        return spread * masked_mean(jnp.abs(out - rows.targets), rows.mask)

    return Problem(lambda key: nnx.state(make(key)), losses, scores)


def masked_mean(errors: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of each column over the targets that are there.

    A task without any has a loss and a gradient of exactly 0: to methods it is absent.
    """
    return jnp.sum(errors * mask, axis=0) / jnp.maximum(mask.sum(axis=0), 1)


def auc(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    r"""Area under the ROC curve: how often a positive is above a negative.

    .. math::

      \frac{\sum_{i: y_i = 1} r_i - P (P + 1) / 2}{P N},

    with the ranks :math:`r_i` among all that have a label, those of ties averaged.

    Args:
      scores: shape `(n,)`.
      labels: 0 or 1, shape `(n,)`.
      mask: 1 where there is a label, shape `(n,)`.

    Returns:
      A scalar; NaN for scores that are not finite, and without both labels.
    """
    ranked = jnp.where(mask > 0, scores, jnp.inf)  # Behind all others.
    ordered = jnp.sort(ranked)
    below, until = (
        jnp.searchsorted(ordered, ranked, side) for side in ("left", "right")
    )
    ranks = (below + until + 1) / 2
    positive, count = mask * labels, mask.sum()
    p = positive.sum()
    area = (positive @ ranks - p * (p + 1) / 2) / (p * (count - p))
    return jnp.where(jnp.isfinite(scores).all(), area, jnp.nan)


def named(molecules: Molecules, losses: jax.Array) -> dict[str, jax.Array]:
    """Losses by name: of each task if they are few, otherwise their mean."""
    if len(molecules.tasks) <= FEW:
        return dict(zip(molecules.tasks, losses))
    return {"loss": losses.mean()}


def metrics(molecules: Molecules, scores: jax.Array) -> dict[str, jax.Array]:
    """Scores by name: of each task if they are few, otherwise their mean."""
    if len(molecules.tasks) <= FEW:
        rows = np.flatnonzero(molecules.scored())
        return {molecules.tasks[i]: scores[i] for i in rows}
    return {"mean": mean_score(molecules, scores)}


def mean_score(molecules: Molecules, scores: jax.Array) -> jax.Array:
    """Mean over the tasks that have a score; of errors, relative to the spread."""
    unit = 1 if molecules.spread is None else molecules.spread
    return (scores / unit)[np.flatnonzero(molecules.scored())].mean()


def make_optimizer(steps: int) -> Callable[[Any], optax.GradientTransformation]:
    """Adam, of which the rate falls to 0, as a function of its first rate."""
    return lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps))
