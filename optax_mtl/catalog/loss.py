"""Rows of the family loss; see :mod:`optax_mtl.methods.loss`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.loss import (
    cosmos,
    cov_weighting,
    dwa,
    famo,
    gls,
    go4align,
    group_dro,
    igb,
    imtl_l,
    ldc_mtl,
    pbi,
    relobralo,
    scale_invariant,
    slaw,
    softadapt,
    stch,
    uncertainty_weighting,
    uw_so,
    v_rex,
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
    "cov_weighting": row(
        cov_weighting.cov_weighting,
        (
            "Multi-Loss Weighting with Coefficient of Variations",
            "WACV 2021",
            "https://arxiv.org/abs/2009.01717",
        ),
        reads="losses",
        scale="mean",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "relobralo": row(
        relobralo.relobralo,
        (
            "Multi-Objective Loss Balancing for Physics-Informed Deep Learning",
            "2021",
            "https://arxiv.org/abs/2110.09813",
        ),
        reads="losses",
        scale="sum",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "softadapt": row(
        softadapt.softadapt,
        (
            "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural"
            " Networks with Multi-Part Loss Functions",
            "2019",
            "https://arxiv.org/abs/1912.12355",
        ),
        reads="losses",
        scale="sum",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "group_dro": row(
        group_dro.group_dro,
        (
            "Distributionally Robust Neural Networks for Group Shifts",
            "ICLR 2020",
            "https://arxiv.org/abs/1911.08731",
        ),
        reads="losses",
        scale="mean",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "v_rex": row(
        v_rex.v_rex,
        (
            "Out-of-Distribution Generalization via Risk Extrapolation (REx)",
            "ICML 2021",
            "https://arxiv.org/abs/2003.00688",
        ),
        reads="losses",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "go4align": row(
        go4align.go4align,
        (
            "GO4Align: Group Optimization for Multi-Task Alignment",
            "NeurIPS 2024",
            "https://arxiv.org/abs/2404.06486",
        ),
        reads="losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "ldc_mtl": row(
        ldc_mtl.ldc_mtl,
        (
            "LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy"
            " Control",
            "2025",
            "https://arxiv.org/abs/2502.08585",
        ),
        reads="losses",
        scale="own",
        state="tasks",
        promises="rotates scales linear_in_scales ignores_absent",
    ),
    "slaw": row(
        slaw.slaw,
        (
            "SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning",
            "2021",
            "https://arxiv.org/abs/2109.08218",
        ),
        reads="losses",
        scale="sum",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
}
