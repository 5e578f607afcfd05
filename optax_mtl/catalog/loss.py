"""Rows of the family loss; see :mod:`optax_mtl.methods.loss`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.loss import (
    cosmos,
    dwa,
    famo,
    gls,
    igb,
    imtl_l,
    pbi,
    scale_invariant,
    stch,
    uncertainty_weighting,
    uw_so,
)

ROWS: dict[str, Entry] = {
    "dwa": row(
        dwa.dwa,
        (
            "End-To-End Multi-Task Learning With Attention",
            "CVPR 2019",
            "https://arxiv.org/abs/1803.10704",
        ),
        reads="losses",
        scale="sum",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "gls": row(
        gls.gls,
        (
            "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss"
            " Strategy for Multi-Task Learning",
            "CVPR Workshops 2019",
            "https://arxiv.org/abs/1904.08492",
        ),
        reads="losses",
        scale="own",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "uncertainty_weighting": row(
        uncertainty_weighting.uncertainty_weighting,
        (
            "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene"
            " Geometry and Semantics",
            "CVPR 2018",
            "https://arxiv.org/abs/1705.07115",
        ),
        reads="losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "imtl_l": row(
        imtl_l.imtl_l,
        (
            "Towards Impartial Multi-task Learning",
            "ICLR 2021",
            "https://openreview.net/forum?id=IMPnRXEWpvr",
        ),
        reads="losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "scale_invariant": row(
        scale_invariant.scale_invariant,
        (
            "Multi-Task Learning as a Bargaining Game",
            "ICML 2022",
            "https://arxiv.org/abs/2202.01017",
        ),
        reads="losses",
        scale="own",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "stch": row(
        stch.stch,
        (
            "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
            "ICML 2024",
            "https://arxiv.org/abs/2402.19078",
        ),
        reads="losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "famo": row(
        famo.famo,
        (
            "FAMO: Fast Adaptive Multitask Optimization",
            "NeurIPS 2023",
            "https://arxiv.org/abs/2306.03792",
        ),
        reads="losses",
        scale="mean",
        state="tasks",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "igb": row(
        igb.igb,
        (
            "Improvable Gap Balancing for Multi-Task Learning",
            "UAI 2023",
            "https://arxiv.org/abs/2307.15429",
        ),
        reads="losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "cosmos": row(
        cosmos.cosmos,
        (
            "Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
            "ICDM 2021",
            "https://arxiv.org/abs/2103.13392",
        ),
        reads="losses",
        scale="own",
        promises="symmetric rotates scales linear_in_scales ignores_absent",
    ),
    "pbi": row(
        pbi.pbi,
        (
            "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition",
            "IEEE TEVC 2007",
            "https://doi.org/10.1109/TEVC.2007.892759",
        ),
        reads="losses",
        scale="own",
        promises="symmetric rotates scales linear_in_scales ignores_absent",
    ),
    "uw_so": row(
        uw_so.uw_so,
        (
            "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
            "2024",
            "https://arxiv.org/abs/2408.07985",
        ),
        reads="losses",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
}
