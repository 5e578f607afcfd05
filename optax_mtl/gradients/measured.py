"""The Gram matrix of some of the shared parameters, such as the last shared layer.

For deep trunks: the T backward passes that measure stop at the measured parameters, and
one more brings the weights to all. For the last of L layers of one size that is
1 + T / (3 L) plain steps. The weights answer to the conflicts in that part alone.
"""

from typing import Any

import jax
import optax

from optax_mtl import tasks, wrappers
from optax_mtl.gradients.backward import pull_back_each
from optax_mtl.gradients.sharing import merge, partition
from optax_mtl.labels import Labels, mask_of


def split_measured(
    params: optax.Params, shared_part: Any, measure: Labels
) -> tuple[Any, Any]:
    """Separates the measured leaves of the shared part from its others.

    Raises:
      ValueError: if none is measured, or one that is not shared.
    """
    mask = mask_of(params, measure, "measure")
    is_shared = jax.tree.map(lambda _, x: x is not None, mask, shared_part)
    marks = zip(jax.tree_util.tree_leaves_with_path(mask), jax.tree.leaves(is_shared))
    marked = [(path, shared) for (path, measured), shared in marks if measured]
    if not marked:
        raise ValueError(
            "measure marks none of the parameters, so that there is nothing to measure;"
            " leave it out to measure all that are shared"
        )
    for path, shared in marked:
        if not shared:
            raise ValueError(
                f"measure marks params{jax.tree_util.keystr(path)}, which is a head:"
                " the tasks meet in the parameters that shared= marks; mark some of"
                " those, such as the last shared layer"
            )
    return partition(shared_part, mask)


def measured_gram(push_forward, primals, losses, measured):
    """Gram matrix of the gradients of some shared parameters.

    Args:
      push_forward: tangents of the shared parameters and the heads to those of the
        losses.
      primals: shared parameters and heads.
      losses: a vector or a list.
      measured: the two parts that :func:`split_measured` makes of the shared ones.
    """
    (part, rest), heads = optax.tree.zeros_like((measured, primals[1]))
    # Linearized again to leave out the rest, not to multiply it by zero.
    _, push_part = jax.linearize(lambda x: push_forward(merge(x, rest), heads), part)
    return tasks.gram(pull_back_each(push_part, (part,), losses)[0])


def measure_on_part(method, part, rest):
    """The method for the stacked gradients of both parts."""
    mask = merge(
        jax.tree.map(lambda _: True, part), jax.tree.map(lambda _: False, rest)
    )
    return wrappers.measure_on(method, mask)
