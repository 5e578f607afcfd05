"""Rows of the family robust; see :mod:`optax_mtl.methods.robust`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.robust import (
    and_mask,
    coordinate_median,
    dare,
    geometric_median,
    gradient_agreement_filter,
    krum,
    sand_mask,
    ties,
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
    "and_mask": row(
        and_mask.and_mask,
        (
            "Learning Explanations That Are Hard to Vary",
            "ICLR 2021",
            "https://arxiv.org/abs/2009.00329",
        ),
        reads="gradients",
        scale="mean",
        promises="symmetric scales agrees ignores_absent",
    ),
    "sand_mask": row(
        sand_mask.sand_mask,
        (
            "SAND-mask: An Enhanced Gradient Masking Strategy for the Discovery of"
            " Invariances in Domain Generalization",
            "2021",
            "https://arxiv.org/abs/2106.02266",
        ),
        reads="gradients",
        scale="mean",
        promises="symmetric agrees ignores_absent",
    ),
    "ties": row(
        ties.ties,
        (
            "TIES-Merging: Resolving Interference When Merging Models",
            "NeurIPS 2023",
            "https://arxiv.org/abs/2306.01708",
        ),
        reads="gradients",
        scale="own",
        promises="symmetric scales ignores_absent",
    ),
    "dare": row(
        dare.dare,
        (
            "Language Models are Super Mario: Absorbing Abilities from Homologous"
            " Models as a Free Lunch",
            "ICML 2024",
            "https://arxiv.org/abs/2311.03099",
        ),
        reads="gradients",
        scale="own",
        state="tasks",
        promises="scales linear_in_scales",
    ),
}
