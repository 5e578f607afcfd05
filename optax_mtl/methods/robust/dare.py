"""Dropping entries at random, and rescaling the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, tasks


class DAREState(NamedTuple):
    """State of :func:`dare`."""

    key: jax.Array  # Data of the key for what is dropped.


def dare(
    drop: jax.typing.ArrayLike = 0.9, *, key: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""DARE: the sum of what is left after entries are dropped at random.

    .. math::

      d = \sum_i \frac{k_i \odot v_i}{1 - p}, \quad
      k_{ij} \sim \operatorname{Bernoulli}(1 - p).

    The expectation is the sum. It is made for task vectors, the differences between
    models and the one that all were fine-tuned from, which get in each other's way less
    when most entries are dropped; see :func:`~optax_mtl.ties` for how to merge some.

    Args:
      drop: :math:`p`, the share of the entries to drop. At least 0, below 1.
      key: seed or typed random key.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a ``drop`` out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.dare(drop=0.75)
      >>> task_vectors = jnp.ones((2, 1000))
      >>> update, _ = method.update(task_vectors, method.init(jnp.zeros(1000)))
      >>> print(jnp.unique(update))  # Of each of the two, nothing or 1 / 0.25.
      [0. 4. 8.]

    References:
      Yu et al, `Language Models are Super Mario: Absorbing Abilities from Homologous
      Models as a Free Lunch <https://arxiv.org/abs/2311.03099>`_, ICML 2024

    .. note::
      Scale the update with :func:`optax.scale` where task vectors are averaged, or
      added with a factor.
    """
    arguments.check_range("drop", drop, "[0, 1)")
    arguments.check_key(key)

    def init_fn(params):
        del params
        return DAREState(arguments.key_data(key))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params) is None:
            return updates, state
        next_key, drop_key = jax.random.split(arguments.key_of(state.key, key))
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(drop_key, len(leaves))
        left = [_drop(x, key, drop) for x, key in zip(leaves, keys)]
        new_updates = jax.tree.unflatten(structure, left)
        new_state = base.keep_if(
            base.all_finite(new_updates),
            DAREState(arguments.key_data(next_key)),
            state,
        )
        return new_updates, new_state

    return base.from_coordinates(init_fn, update_fn)


def _drop(x, key, drop):
    accurate = jnp.promote_types(x.dtype, jnp.float32)
    kept = jax.random.bernoulli(key, 1 - drop, x.shape)
    # What is not finite is not dropped: the step is to be skipped.
    leave = lambda g, keep: jnp.where(keep | ~jnp.isfinite(g), g.astype(accurate), 0)
    total = coordinates.reduce(jnp.add, coordinates.each(leave, x, kept))
    return (total / (1 - drop)).astype(x.dtype)
