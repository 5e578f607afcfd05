"""Rows of the family priority; see :mod:`optax_mtl.methods.priority`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.priority import (
    adaptive_weight,
    bloop,
    cosine_gating,
    dynamic_barrier,
    metabalance,
    pcd,
    priority_projection,
)

ROWS: dict[str, Entry] = {
    "bloop": row(
        bloop.bloop,
        (
            "Careful with that Scalpel: Improving Gradient Surgery with an EMA",
            "ICML 2024",
            "https://arxiv.org/abs/2402.02998",
        ),
        reads="gradients",
        scale="mean",
        state="P",
        promises="rotates scales",
    ),
    "cosine_gating": row(
        cosine_gating.cosine_gating,
        (
            "Adapting Auxiliary Losses Using Gradient Similarity",
            "2018",
            "https://arxiv.org/abs/1812.02224",
        ),
        reads="gram",
        scale="sum",
        promises="rotates scales linear_in_scales agrees",
    ),
    "dynamic_barrier": row(
        dynamic_barrier.dynamic_barrier,
        (
            "Automatic and Harmless Regularization with Constrained and Lexicographic"
            " Optimization: A Dynamic Barrier Approach",
            "NeurIPS 2021",
            "https://openreview.net/forum?id=817F5yuNAf1",
        ),
        reads="gram",
        scale="own",
        promises="rotates scales agrees",
    ),
    "metabalance": row(
        metabalance.metabalance,
        (
            "MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient"
            " Magnitudes of Auxiliary Tasks",
            "WWW 2022",
            "https://arxiv.org/abs/2203.06801",
        ),
        reads="gradients",
        scale="sum",
        state="tasks",
        promises="scales agrees",
    ),
    "pcd": row(
        pcd.pcd,
        (
            "Not All Objectives Are Born Equal: Priority-Constrained Descent for"
            " Hierarchical Multi-Objective Optimization",
            "TMLR 2026",
            "https://arxiv.org/abs/2606.29521",
        ),
        reads="gram",
        scale="mean",
        state="tasks",
        promises="rotates scales scale_free agrees",
    ),
    "priority_projection": row(
        priority_projection.priority_projection,
        (
            "Efficient Lifelong Learning with A-GEM",
            "ICLR 2019",
            "https://arxiv.org/abs/1812.00420",
        ),
        reads="gram",
        scale="sum",
        promises="rotates scales linear_in_scales agrees ignores_absent",
    ),
    "adaptive_weight": row(
        adaptive_weight.adaptive_weight,
        (
            "Taming Transformers for High-Resolution Image Synthesis",
            "CVPR 2021",
            "https://arxiv.org/abs/2012.09841",
        ),
        reads="gram",
        scale="sum",
        promises="rotates scales agrees",
    ),
}
