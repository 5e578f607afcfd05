"""Rows of the family baseline; see :mod:`optax_mtl.methods.baseline`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.baseline import (
    linear,
    random_weights,
)

_UNITARY = (
    "In Defense of the Unitary Scalarization for Deep Multi-Task Learning",
    "NeurIPS 2022",
    "https://arxiv.org/abs/2201.04122",
)

ROWS: dict[str, Entry] = {
    "linear": row(
        linear.linear,
        _UNITARY,
        reads="",
        scale="sum",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "mean": row(
        linear.mean,
        _UNITARY,
        reads="",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales agrees",
    ),
    "random_weights": row(
        random_weights.random_weights,
        (
            "Reasonable Effectiveness of Random Weighting: A Litmus Test for"
            " Multi-Task Learning",
            "TMLR 2022",
            "https://arxiv.org/abs/2111.10603",
        ),
        reads="",
        scale="mean",
        state="tasks",
        promises="rotates scales linear_in_scales agrees",
    ),
}
