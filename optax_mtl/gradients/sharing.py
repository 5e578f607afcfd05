"""Which parameters all tasks share, and which are heads."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import labels, tasks


def split(tree: Any, shared: labels.Labels | None) -> tuple[Any, Any]:
    """Separates the shared leaves from the others; None stands for a hole.

    Raises:
      TypeError: for leaves that are not floating point.
      ValueError: if none is shared, or there is none, unless a group of
        :func:`optax.partition` has none.
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if not jax.tree.leaves(tree, is_leaf=is_masked):
        raise ValueError(
            "the tree of parameters holds no arrays, so that there is nothing to"
            f" differentiate with respect to: {jax.tree.structure(tree)}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        tasks.check_floating(
            f"the parameter params{jax.tree_util.keystr(path)}",
            leaf,
            ", which has no gradient; hand it to losses_fn as another argument (with"
            " Flax NNX, split the model by nnx.Param)",
        )
    mask = labels.mask_of(tree, shared, "shared")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(mask)]
    if paths and not any(jax.tree.leaves(mask)):
        first, last = (
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path in (paths[0], paths[-1])
        )
        raise ValueError(
            f"shared marks none of the parameters, from {first!r} to {last!r}, so that"
            " there is nothing to resolve"
        )
    return partition(tree, mask)


def split_floating(tree: Any) -> tuple[Any, Any]:
    """Separates the floating-point leaves from the others, such as masks."""
    is_floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return partition(tree, jax.tree.map(is_floating, tree))


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """The leaves that a tree of bools marks, and the others; None stands for a hole."""
    pick = lambda keep: jax.tree.map(lambda m, x: x if m is keep else None, mask, tree)
    return pick(True), pick(False)


def merge(shared_part: Any, heads: Any) -> Any:
    """The tree that :func:`partition` took apart."""
    is_hole = lambda x: x is None
    choose = lambda s, h: h if s is None else s
    return jax.tree.map(choose, shared_part, heads, is_leaf=is_hole)
