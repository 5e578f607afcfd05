"""Measures of conflict, out of a Gram matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import base, report, solvers, tasks
from optax_mtl.labels import Labels, labels_of


def cosine_similarity(gram: jax.Array) -> jax.Array:
    """Cosines between the task gradients, shape ``(T, T)``; 0 for an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> gram = jnp.array([[18.0, -22], [-22, 38]])
      >>> print(jnp.array_str(optax_mtl.cosine_similarity(gram), precision=3))
      [[ 1.    -0.841]
       [-0.841  1.   ]]
    """
    _check_gram(gram, "cosine_similarity")
    norms = jnp.sqrt(jnp.diagonal(gram))
    # Exactly zero where a task is absent, hence safe to divide by elsewhere.
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return jnp.clip(gram * jnp.outer(inverse, inverse), -1, 1)


class Conflicts(NamedTuple):
    """What :func:`conflicts` reports."""

    norms: jax.Array  # Norms of the gradients, shape `(T,)`.
    cosines: jax.Array  # Between each two tasks, shape `(T, T)`.
    min_cosine: jax.Array  # Of the most opposed pair, scalar; 1 without a pair.
    conflicting: jax.Array  # Share of the pairs with a negative cosine, scalar.
    alignment: jax.Array  # Norm of the sum over the sum of the norms, scalar.
    names: tuple[str, ...] = ()  # Of the tasks, if they have any; not in the tree.

    def __repr__(self):
        arrays = [x for x in self[:-1] if isinstance(x, (np.ndarray, jax.Array))]
        traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
        if traced or len(arrays) < len(self) - 1 or self.norms.ndim != 1:
            shapes = [f"{k}={np.shape(x)}" for k, x in zip(self._fields, self[:-1])]
            return f"Conflicts of shapes {', '.join(shapes)}"
        return report.describe(self)


jax.tree_util.register_pytree_with_keys(
    Conflicts,
    lambda it: (
        [(jax.tree_util.GetAttrKey(k), x) for k, x in zip(it._fields, it[:-1])],
        it.names,
    ),
    lambda names, leaves: Conflicts(*leaves)._replace(names=names),
)


def conflicts(gram: jax.Array, names: Any = None) -> Conflicts:
    r"""How much the gradients of the tasks conflict, from their Gram matrix.

    Args:
      gram: shape ``(T, T)``, as returned by :func:`gram`.
      names: of the tasks, for the report to show: the dict of their losses, or a
        sequence of names in the order of the gradients.

    Returns:
      Norms, cosines, the smallest cosine, the share of conflicting pairs, and
      the alignment :math:`\|\sum_i g_i\| / \sum_i \|g_i\|`, which is 1 for
      gradients of one direction and 0 for gradients that cancel. Absent tasks
      are left out of every figure; one that is not finite makes every figure that it
      takes part in NaN. ``print`` shows a summary.

    Raises:
      ValueError: for a number of names other than T, and for a name used twice.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = {"w": jnp.array([[-4.0, 1, 1], [6, 1, 1]])}
      >>> report = optax_mtl.conflicts(optax_mtl.gram(updates))
      >>> print(f"{report.min_cosine:.3f} {report.alignment:.3f}")
      -0.841 0.333
      >>> losses = {"main": jnp.array(2.0), "aux": jnp.array(3.0)}
      >>> print(optax_mtl.conflicts(optax_mtl.gram(updates), names=losses))
      100% of the pairs of 2 tasks conflict; alignment 0.33
      most opposed: aux and main, cosine -0.84
                norm    aux  main
      aux       4.24   1.00 -0.84
      main      6.16  -0.84  1.00

    References:
      Yu et al, `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020, for conflicting pairs.
    """
    _check_gram(gram, "conflicts")
    known = names_for(names, len(gram))
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    exists = norms != 0  # NaN is not absent.
    cosines = cosine_similarity(gram)
    pairs = jnp.outer(exists, exists) & ~jnp.eye(len(gram), dtype=bool)
    opposed = (cosines < 0) + 0 * cosines  # Not known where the cosine is not.
    total = norms.sum()
    return Conflicts(
        norms=norms,
        cosines=cosines,
        min_cosine=jnp.min(jnp.where(pairs, cosines, 1)),
        conflicting=jnp.sum(jnp.where(pairs, opposed, 0)) / jnp.maximum(pairs.sum(), 1),
        alignment=jnp.where(
            total == 0,
            1,
            jnp.sqrt(jnp.maximum(gram.sum(), 0)) / jnp.where(total == 0, 1, total),
        ),
        names=known,
    )


def conflicts_by_group(
    updates: optax.Updates, labels: Labels | None = None, names: Any = None
) -> dict[str, Conflicts]:
    """How much the gradients conflict in each layer or block on its own.

    Args:
      updates: stacked gradients, leaves of shape ``(T, *p)``.
      labels: the group of each parameter: a tree of names, a function of the path of a
        parameter, such as ``"encoder/layer_1/kernel"``, or one of the parameters to
        such a tree. By default each parameter is a group, named by its path.
      names: of the tasks, as in :func:`conflicts`.

    Returns:
      What :func:`conflicts` says of each group, by name, in the order of the
      parameters.

    Raises:
      TypeError: for a :class:`GramView`, which is one of all parameters.
      ValueError: for labels of another structure.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = {"trunk": jnp.eye(2), "last": jnp.array([[1.0], [-3]])}
      >>> for group, report in optax_mtl.conflicts_by_group(updates).items():
      ...     print(group, report.min_cosine)
      last -1.0
      trunk 0.0
    """
    tasks.check_stacked(updates, reader="conflicts_by_group")
    groups = labels_of(updates, labels or (lambda path: path), "labels")
    leaves: dict[str, list[jax.Array]] = {}
    for group, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(updates)):
        leaves.setdefault(group, []).append(leaf)
    return {group: conflicts(tasks.gram(x), names) for group, x in leaves.items()}


def magnitude_similarity(gram: jax.Array) -> jax.Array:
    r"""How alike the norms of the gradients of each two tasks are.

    .. math::

      \Phi_{ij} = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}

    Args:
      gram: shape ``(T, T)``, as returned by :func:`gram`.

    Returns:
      Array of shape ``(T, T)``: 1 for equal norms, towards 0 where one dwarfs the
      other, and 0 for an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> gram = jnp.array([[1.0, 0], [0, 9]])
      >>> print(jnp.array_str(optax_mtl.magnitude_similarity(gram), precision=2))
      [[1.  0.6]
       [0.6 1. ]]

    References:
      Yu et al, `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020
    """
    _check_gram(gram, "magnitude_similarity")
    squares = jnp.maximum(jnp.diagonal(gram), 0)
    larger = jnp.maximum(squares[:, None], squares[None])
    smaller = jnp.minimum(squares[:, None], squares[None])
    ratio = smaller / jnp.where(larger > 0, larger, 1)
    return 2 * jnp.sqrt(ratio) / (1 + ratio)


def dominance(gram: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""Share of each task in the update.

    .. math::

      s_i = \frac{\langle w_i g_i, d \rangle}{\|d\|^2}, \quad d = \sum_j w_j g_j

    Args:
      gram: shape ``(T, T)``, as returned by :func:`gram`.
      weights: of the tasks in the update, shape ``(T,)``, such as a method makes; by
        default those of the plain sum.

    Returns:
      Array of shape ``(T,)`` that sums to 1: negative for a task that the update works
      against, and 0 for all where the update vanishes.

    Raises:
      ValueError: for a number of weights other than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> gram = optax_mtl.gram(jnp.array([[3.0, 0], [-1, 1]]))
      >>> print(jnp.array_str(optax_mtl.dominance(gram), precision=2))
      [ 1.2 -0.2]
    """
    _, weights, products, norm2 = _update_of(gram, weights, "dominance")
    return weights * products * base.reciprocal(norm2)


def update_cosines(gram: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""Cosine between the update and the gradient of each task.

    .. math::

      c_i = \frac{\langle g_i, d \rangle}{\|g_i\| \|d\|}, \quad d = \sum_j w_j g_j

    Args:
      gram: shape ``(T, T)``, as returned by :func:`gram`.
      weights: of the tasks in the update, shape ``(T,)``; by default those of the plain
        sum.

    Returns:
      Array of shape ``(T,)``: negative for a task whose loss the update raises, and 0
      for an absent task or an update that vanishes.

    Raises:
      ValueError: for a number of weights other than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> gram = optax_mtl.gram(jnp.array([[3.0, 0], [-1, 1]]))
      >>> print(jnp.array_str(optax_mtl.update_cosines(gram), precision=2))
      [ 0.89 -0.32]
      >>> weights = optax_mtl.weights.mgda(gram)
      >>> print(jnp.array_str(optax_mtl.update_cosines(gram, weights), precision=2))
      [0.24 0.51]
    """
    gram, _, products, norm2 = _update_of(gram, weights, "update_cosines")
    return products * base.reciprocal(jnp.sqrt(jnp.diagonal(gram) * norm2))


def _update_of(
    gram: jax.Array, weights: jax.Array | None, name: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gram matrix of unit trace, weights, inner products with the update and its
    squared norm, 0 if that is rounding.
    """
    _check_gram(gram, name)
    count = len(gram)
    weights = jnp.ones(count) if weights is None else weights
    if np.shape(weights) != (count,):
        raise ValueError(
            f"weights are {weights!r}, expected one for each task, shape ({count},)"
        )
    weights, (gram, _) = jnp.asarray(weights), solvers.normalize_gram(gram)
    norm2, noise = solvers.combined_norm2(gram, weights)
    return gram, weights, gram @ weights, jnp.where(norm2 > noise, norm2, 0)


def names_for(names: Any, num_tasks: int) -> tuple[str, ...]:
    """The names in a dict of losses or a sequence of text; none of anything else."""
    if names is None:
        return ()
    if isinstance(names, np.ndarray):
        names = names.tolist()
    known = tasks.names_of(names)
    if known is None:
        leaves = jax.tree.leaves(names)
        is_number = lambda x: hasattr(x, "shape") or isinstance(x, (int, float))
        if all(map(is_number, leaves)):
            return ()  # Losses without names, as a vector.
        if not all(isinstance(x, str) for x in leaves):
            raise TypeError(
                f"names are {names!r}; hand over the dict of the losses, or a list of"
                " text in the order of the gradients, that of the sorted names"
            )
        known = leaves
        tasks.check_names_differ(known)
    if len(known) != num_tasks:
        raise ValueError(
            f"there are {len(known)} names, {', '.join(known)}, but the Gram matrix is"
            f" one of {num_tasks} tasks"
        )
    return tuple(known)


def _check_gram(gram: Any, name: str) -> None:
    """Refuses gradients where their Gram matrix is meant."""
    shape = getattr(gram, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != shape[1]:
        raise TypeError(
            f"{name} takes a Gram matrix, shape (T, T), got shapes"
            f" {jax.tree.map(jnp.shape, gram)}: call"
            f" optax_mtl.{name}(optax_mtl.gram(updates))"
        )
