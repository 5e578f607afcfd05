"""Similarity-aware momentum gradient surgery."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, report, tasks


class SAMGSState(NamedTuple):
    """State of :func:`sam_gs`."""

    counts: jax.Array  # Gradients seen from each task, shape `(num_tasks,)`.
    momentum: optax.Updates  # Moving averages of the gradients, one per task.
    steps: jax.Array  # Dissimilarities seen.
    dissimilarity: jax.Array  # Moving average of the squared dissimilarity.

    def __repr__(self):
        return report.describe_state(self)


def sam_gs(
    num_tasks: int,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    gamma: jax.typing.ArrayLike = 0.1,
    similarity: str = "pairs",
    scale_by_num_tasks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Similarity-aware momentum gradient surgery (SAM-GS).

    Measures how similar the magnitudes of the gradients are,

    .. math::

      \psi_{ij} = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}, \quad
      \Psi = \operatorname{mean}_{i < j} \psi_{ij},

    and either equalises the norms, if they differ, or else scales each coordinate
    by the size of the task's momentum:

    .. math::

      d = \sum_i \frac{\operatorname{mean}_j \|g_j\|}{\|g_i\|} \, g_i
      \;\; \text{if } \Psi < \gamma, \qquad
      d = \sum_i \frac{|\hat{m}_i|}{\sqrt{\hat{h}}} \odot g_i
      \;\; \text{otherwise},

    with the moving averages :math:`m_i` of :math:`g_i` and :math:`h` of
    :math:`(1 - \Psi)^2`, both with bias correction.

    Clip the update, as the authors do: the first branch is linear in the gradients
    and the second one is quadratic, up to 1000 times larger for equal norms, where
    :math:`\hat{h}` is almost 0. Without the clip, the change of branch wrecks the
    second moment of Adam.

    Args:
      num_tasks: number of tasks, T.
      b1: decay of the momentum of each task. In [0, 1).
      b2: decay of the mean dissimilarity. In [0, 1).
      gamma: similarity below which norms are equalised; 0: never. The benchmarks of the
        paper use 0.7 to 0.9. At least 0.
      similarity: ``"pairs"`` averages over pairs of two tasks, as the authors' code
        does. ``"paper"`` also counts each task with itself, as the formula in the
        paper does; it is never below ``1 / T``, so that two tasks with the default
        ``gamma`` never equalise. ``"min"`` compares the smallest one with ``gamma``,
        as the authors' code for reinforcement learning does.
      scale_by_num_tasks: whether to multiply the update by T, as the authors' code
        does before the clip.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for an unknown ``similarity``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[3.0, 4], [0, 0.1]])
      >>> method = optax_mtl.sam_gs(num_tasks=2)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [1.53 4.59]

      The published optimizer:

      >>> import optax
      >>> tx = optax.chain(
      ...     optax_mtl.sam_gs(num_tasks=2),
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.adam(1e-3),
      ... )

    References:
      Borsani et al, `Gradient Similarity Surgery in Multi-Task Deep Learning
      <https://arxiv.org/abs/2506.06130>`_, 2025

    .. note::
      The paper's pseudo-code multiplies by the gradient twice when it equalises;
      this is the authors' code. The update is not linear in the scale of the
      gradients. Equal and opposite gradients count as similar, and may cancel.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("b1", b1, "[0, 1)")
    arguments.check_range("b2", b2, "[0, 1)")
    arguments.check_range("gamma", gamma, "[0, inf)")
    arguments.check_choice("similarity", similarity, ("pairs", "paper", "min"))
    arguments.check_choice("scale_by_num_tasks", scale_by_num_tasks, (True, False))

    def init_fn(params):
        return SAMGSState(
            counts=jnp.zeros(num_tasks, jnp.int32),
            momentum=base.zeros_like(params, num_tasks, dtype=float),
            steps=jnp.zeros([], jnp.int32),
            dissimilarity=jnp.zeros([], float),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        gram = tasks.gram(updates)
        exists = tasks.present(gram)
        norms = jnp.sqrt(jnp.diagonal(gram))
        psi, smallest = magnitude_similarity(norms, itself=similarity == "paper")

        some = jnp.any(exists)
        steps = jnp.where(some, optax.safe_increment(state.steps), state.steps)
        # The paper's constant, within the average: also its largest scale.
        squared = b2 * state.dissimilarity + (1 - b2) * (1 - psi) ** 2 + 1e-8
        dissimilarity = jnp.where(some, squared, state.dissimilarity)
        counts = jnp.where(exists, optax.safe_increment(state.counts), state.counts)

        def average(momentum, updates):
            new = lambda m, g: jnp.where(
                tasks.along_tasks(exists, m), b1 * m + (1 - b1) * g, m
            )
            return jax.tree.map(new, momentum, updates)

        momentum = average(state.momentum, updates)

        equalise = (smallest if similarity == "min" else psi) < gamma
        # Divisions are by zero only for absent tasks, whose gradient is zero.
        mean_norm = norms.sum() / jnp.maximum(exists.sum(), 1)
        equal = jnp.where(exists, mean_norm / jnp.where(exists, norms, 1), 0)
        debias = 1 - b1 ** jnp.maximum(counts, 1)
        root = jnp.sqrt(dissimilarity / (1 - b2 ** jnp.maximum(steps, 1)))
        inverse = 1 / (debias * jnp.where(some, root, 1))
        factor = exists.sum() if scale_by_num_tasks else 1

        def resolve(g, m):
            scale = lambda equal, inverse, m, g: (
                jnp.where(equalise, equal, jnp.abs(m) * inverse) * g
            )
            scaled = coordinates.each(scale, equal, inverse, m, g)
            return (factor * coordinates.reduce(jnp.add, scaled)).astype(g.dtype)

        new_state = SAMGSState(
            counts=counts,
            momentum=base.again(average, state.momentum, updates),
            steps=steps,
            dissimilarity=dissimilarity,
        )
        out = jax.tree.map(resolve, updates, momentum)
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return base.from_coordinates(init_fn, update_fn)


def magnitude_similarity(
    norms: jax.Array, itself: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Mean and smallest similarity of the norms of each two present tasks.

    Args:
      norms: norms of the gradients, shape ``(T,)``.
      itself: whether each task is compared with itself, too.

    Returns:
      Two scalars in [0, 1]; 1 where there is nothing to compare.
    """
    exists = norms != 0
    product = 2 * jnp.outer(norms, norms)
    squares = norms[:, None] ** 2 + norms[None] ** 2
    pairs = jnp.outer(exists, exists)
    if not itself:
        pairs = pairs & ~jnp.eye(len(norms), dtype=bool)
    similarities = jnp.where(pairs, product / jnp.where(pairs, squares, 1), 1)
    mean = jnp.mean(similarities, where=pairs | ~jnp.any(pairs))
    return mean, jnp.min(similarities)
