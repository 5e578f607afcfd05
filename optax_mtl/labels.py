"""Masks and labels of parameters: a tree, or a function of the path or the tree."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Labels = Any  # Tree with the structure of the parameters or a prefix, or a function.


class Path(str):
    """The path of a parameter; an error to whoever takes it for a tree."""


def _refuse(*_: Any) -> Any:
    raise TypeError("this is the path of a parameter, not a tree of parameters")


# So that a function of the tree, which maps over its leaves, is told from one of the
# path.
jax.tree_util.register_pytree_node(Path, _refuse, _refuse)


def labels_of(tree: Any, labels: Labels, name: str) -> Any:
    """A label for each leaf of a tree, with the structure of the tree.

    Args:
      tree: parameters.
      labels: a tree of labels with the structure of the parameters, or a prefix of
        it, also where that tree can be called; a function of the path of a parameter,
        such as ``"encoder/layer_1/kernel"``, to its label; or a function of the
        parameters to a tree of labels.
      name: what the labels are called, for the error.

    Raises:
      ValueError: if the labels have another structure.
    """
    if callable(labels) and jax.tree_util.all_leaves([labels]):
        labels = _call(labels, tree)
    try:
        return jax.tree.broadcast(labels, tree)
    except ValueError as error:
        raise ValueError(
            f"{name} should have the structure of the parameters or a prefix of it, or"
            " be a function of the path of a parameter, such as"
            f" lambda path: 'trunk' in path, but is {labels} for parameters of"
            f" {jax.tree.structure(tree)}"
        ) from error


def mask_of(tree: Any, mask: Labels | None, name: str) -> Any:
    """A tree of bools with the structure of the tree; all true for ``None``.

    Args:
      tree: parameters.
      mask: as in :func:`labels_of`, of bools, NumPy's or JAX's bools, or 0 and 1.
      name: what the mask is called, for the error.

    Raises:
      ValueError: if the mask has another structure or holds something else.
    """

    def as_bool(path, value):
        is_number = isinstance(value, (bool, int, np.generic, np.ndarray, jax.Array))
        if is_number and not isinstance(value, jax.core.Tracer):
            number = np.asarray(value)
            if number.ndim == 0 and number.dtype.kind in "biu" and number in (0, 1):
                return bool(number)
        raise ValueError(
            f"{name} is {value!r} for params{jax.tree_util.keystr(path)}; it should be"
            " True or False, known when the step is traced"
        )

    marks = labels_of(tree, True if mask is None else mask, name)
    return jax.tree_util.tree_map_with_path(as_bool, marks)


def _call(function: Callable[[Any], Any], tree: Any) -> Any:
    """What the function makes of each path, or else of the tree."""

    def by_path(path, _):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        label = function(Path(text))
        label = str(label) if isinstance(label, Path) else label
        if not jax.tree_util.all_leaves([label]):
            raise TypeError(f"{label!r} for {text!r} is no label")
        return label

    try:
        return jax.tree_util.tree_map_with_path(by_path, tree)
    except Exception as error:  # Whatever a function of the tree raises for a path.
        by_path_error = error
    try:
        return function(tree)
    except Exception as error:
        error.add_note(
            "The function works neither with the tree of parameters nor with their"
            f" paths, such as 'encoder/layer_1/kernel': {by_path_error!r}"
        )
        raise
