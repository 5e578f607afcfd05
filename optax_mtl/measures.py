"""Measures of conflict, out of a Gram matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_mtl import report, tasks


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
