"""Merging by trimming, electing a sign, and averaging what has it."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, tasks


def ties(
    density: jax.typing.ArrayLike = 0.2,
) -> optax.GradientTransformationExtraArgs:
    r"""TIES-Merging: trim, elect a sign, and average the entries that have it.

    Keeps of each task the entries :math:`v` of largest magnitude over all parameters,
    and in each coordinate those of the sign of their sum:

    .. math::

      d_p = \frac{\sum_{i \in A_p} v_{ip}}{|A_p|}, \quad
      A_p = \Big\{ i : \operatorname{sign} v_{ip} =
      \operatorname{sign} \sum_j v_{jp} \Big\}.

    It is made for task vectors, the differences between models and the one that all
    were fine-tuned from, which are stacked as the gradients of tasks are.

    Args:
      density: the share of the entries to keep, rounded up to a whole number; more
        where magnitudes are equal. Above 0, to 1.

    Returns:
      A gradient transformation that aggregates stacked updates. Where no sign wins, the
      update is zero.

    Raises:
      ValueError: for a ``density`` out of range.

    Examples:
      Three models, merged into what they were fine-tuned from:

      >>> import jax, jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> pretrained = {"w": jnp.array([1.0, 1, 1]), "b": jnp.array([0.0, 2])}
      >>> models = [
      ...   {"w": jnp.array([3.0, 1.1, 1]), "b": jnp.array([0.5, 2])},
      ...   {"w": jnp.array([2.0, 0.0, 1]), "b": jnp.array([0.1, 2])},
      ...   {"w": jnp.array([0.5, 0.4, 1]), "b": jnp.array([0.1, 2])},
      ... ]
      >>> stack = lambda p, *tuned: jnp.stack([x - p for x in tuned])
      >>> task_vectors = jax.tree.map(stack, pretrained, *models)
      >>> method = optax_mtl.ties(density=0.4)  # Two of five entries each.
      >>> update, _ = method.update(task_vectors, method.init(pretrained))
      >>> merged = optax.apply_updates(pretrained, update)
      >>> print(jnp.array_str(merged["w"], precision=3), merged["b"])
      [2.5 0.2 1. ] [0.5 2. ]

    References:
      Yadav et al, `TIES-Merging: Resolving Interference When Merging Models
      <https://arxiv.org/abs/2306.01708>`_, NeurIPS 2023

    .. note::
      Scale the update with :func:`optax.scale` where the paper has a factor
      :math:`\lambda`. The authors' code keeps one entry more, and gives coordinates
      where the sum is exactly 0 the sign of most others.
    """
    arguments.check_range("density", density, "(0, 1]")

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params) is None:
            return updates, state
        accurate = jnp.result_type(jnp.float32, *jax.tree.leaves(updates))
        levels = _levels(updates, density, accurate)
        merge = lambda x: _merge(x, levels, accurate)
        return jax.tree.map(merge, updates), state

    return base.from_coordinates(optax.init_empty_state, update_fn)


def _magnitude(x, accurate):
    """Whole numbers in the order of the magnitudes: their bits."""
    whole = jnp.int64 if accurate == jnp.float64 else jnp.int32
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(accurate)), whole)


def _levels(updates, density, accurate):
    """Magnitude of the last entry of each task that is kept, shape `(T,)`.

    Bit for bit, the largest that enough entries reach: a sort would take longer, and
    gather what is sharded.
    """
    leaves = jax.tree.leaves(updates)
    # Not one more by a rounding error, but one at least.
    size = sum(x[0].size for x in leaves)
    number = jnp.maximum(jnp.ceil(density * size - 1e-4), 1)
    magnitudes = [_magnitude(x, accurate) for x in leaves]
    whole = magnitudes[0].dtype

    def set_bit(i, levels):
        candidates = levels + (jnp.ones([], whole) << (jnp.iinfo(whole).bits - 2 - i))
        reach = [x >= tasks.along_tasks(candidates, x) for x in magnitudes]
        counts = [jnp.sum(x, tuple(range(1, x.ndim))).astype(accurate) for x in reach]
        return jnp.where(sum(counts) >= number, candidates, levels)

    start = jnp.zeros(len(leaves[0]), whole)
    return jax.lax.fori_loop(0, jnp.iinfo(whole).bits - 1, set_bit, start)


def _merge(x, levels, accurate):
    def keep(g, level):
        return jnp.where(_magnitude(g, accurate) >= level, g.astype(accurate), 0)

    kept = coordinates.each(keep, x, levels)
    total = coordinates.reduce(jnp.add, kept)
    size = coordinates.reduce(jnp.add, coordinates.each(jnp.abs, kept))
    # A sum of nothing but rounding errors has no sign.
    noise = len(x) * jnp.finfo(accurate).eps * size
    sign = jnp.where(jnp.abs(total) > noise, jnp.sign(total), 0)
    has_sign = coordinates.each(lambda g: (g * sign > 0).astype(accurate), kept)
    count = coordinates.reduce(jnp.add, has_sign)
    chosen = coordinates.reduce(jnp.add, coordinates.each(jnp.multiply, has_sign, kept))
    # What is not finite is not left out: the step is to be skipped.
    mean = chosen / jnp.maximum(count, 1)
    return jnp.where(jnp.isfinite(size), mean, jnp.nan).astype(x.dtype)
