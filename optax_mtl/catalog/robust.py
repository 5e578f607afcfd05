"""Rows of the family robust; see :mod:`optax_mtl.methods.robust`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.robust import (
    coordinate_median,
    geometric_median,
    gradient_agreement_filter,
    krum,
    trimmed_mean,
)

ROWS: dict[str, Entry] = {
    "coordinate_median": row(
        coordinate_median.coordinate_median,
        (
            "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            "ICML 2018",
            "https://arxiv.org/abs/1803.01498",
        ),
        reads="gradients",
        scale="mean",
        promises="symmetric scales agrees ignores_absent",
    ),
    "geometric_median": row(
        geometric_median.geometric_median,
        (
            "Robust Aggregation for Federated Learning",
            "2019",
            "https://arxiv.org/abs/1912.13445",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "krum": row(
        krum.krum,
        (
            "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            "NeurIPS 2017",
            "https://arxiv.org/abs/1703.02757",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "trimmed_mean": row(
        trimmed_mean.trimmed_mean,
        (
            "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            "ICML 2018",
            "https://arxiv.org/abs/1803.01498",
        ),
        reads="gradients",
        scale="mean",
        promises="symmetric scales agrees ignores_absent",
    ),
    "gradient_agreement_filter": row(
        gradient_agreement_filter.gradient_agreement_filter,
        (
            "Beyond Gradient Averaging in Parallel Optimization: Improved Robustness"
            " through Gradient Agreement Filtering",
            "2024",
            "https://arxiv.org/abs/2412.18052",
        ),
        reads="gram",
        scale="mean",
        promises="rotates scales agrees ignores_absent",
    ),
}
