"""Rows of the family conflict; see :mod:`optax_mtl.methods.conflict`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.conflict import (
    aligned_mtl,
    cagrad,
    config,
    dualproj,
    epo,
    fedmgda,
    ferero,
    gcond,
    graddrop,
    gradvac,
    imgrad,
    m_config,
    mgda,
    mmpareto,
    moco,
    modo,
    pareto_mtl,
    pcgrad,
    sdmgrad,
    upgrad,
)

ROWS: dict[str, Entry] = {
    "cagrad": row(
        cagrad.cagrad,
        (
            "Conflict-Averse Gradient Descent for Multi-task Learning",
            "NeurIPS 2021",
            "https://arxiv.org/abs/2110.14048",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "pcgrad": row(
        pcgrad.pcgrad,
        (
            "Gradient Surgery for Multi-Task Learning",
            "NeurIPS 2020",
            "https://arxiv.org/abs/2001.06782",
        ),
        reads="gram",
        scale="sum",
        state="tasks",
        promises="rotates scales linear_in_scales agrees",
    ),
    "aligned_mtl": row(
        aligned_mtl.aligned_mtl,
        (
            "Independent Component Alignment for Multi-Task Learning",
            "CVPR 2023",
            "https://arxiv.org/abs/2305.19000",
        ),
        reads="gram",
        scale="sum",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "config": row(
        config.config,
        (
            "ConFIG: Towards Conflict-free Training of Physics Informed Neural"
            " Networks",
            "ICLR 2025",
            "https://arxiv.org/abs/2408.11104",
        ),
        reads="gram",
        scale="sum",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "dualproj": row(
        dualproj.dualproj,
        (
            "Gradient Episodic Memory for Continual Learning",
            "NeurIPS 2017",
            "https://arxiv.org/abs/1706.08840",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales never_conflicts stationary agrees"
        " ignores_absent",
    ),
    "gcond": row(
        gcond.gcond,
        (
            "GCond: Gradient Conflict Resolution via Accumulation-based"
            " Stabilization for Large-Scale Multi-Task Learning",
            "IEEE Access 2026",
            "https://arxiv.org/abs/2509.07252",
        ),
        reads="gradients",
        scale="sum",
        state="T x P",
        promises="rotates scales agrees ignores_absent",
    ),
    "graddrop": row(
        graddrop.graddrop,
        (
            "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient"
            " Sign Dropout",
            "NeurIPS 2020",
            "https://arxiv.org/abs/2010.06808",
        ),
        reads="gradients",
        scale="sum",
        state="tasks",
        promises="symmetric scales agrees ignores_absent",
    ),
    "gradvac": row(
        gradvac.gradvac,
        (
            "Gradient Vaccine: Investigating and Improving Multi-task"
            " Optimization in Massively Multilingual Models",
            "ICLR 2021",
            "https://arxiv.org/abs/2010.05874",
        ),
        reads="gram",
        scale="sum",
        state="tasks",
        promises="rotates scales linear_in_scales agrees",
    ),
    "mgda": row(
        mgda.mgda,
        (
            "Multi-Task Learning as Multi-Objective Optimization",
            "NeurIPS 2018",
            "https://arxiv.org/abs/1810.04650",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales never_conflicts stationary agrees"
        " ignores_absent",
    ),
    "upgrad": row(
        upgrad.upgrad,
        (
            "Jacobian Descent for Multi-Objective Optimization",
            "2024",
            "https://arxiv.org/abs/2406.16232",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales never_conflicts stationary"
        " agrees ignores_absent",
    ),
    "moco": row(
        moco.moco,
        (
            "Mitigating Gradient Bias in Multi-objective Learning: A Provably"
            " Convergent Approach",
            "ICLR 2023",
            "https://arxiv.org/abs/2210.12624",
        ),
        reads="gradients",
        scale="own",
        state="T x P",
        promises="symmetric rotates ignores_absent",
    ),
    "modo": row(
        modo.modo,
        (
            "Three-Way Trade-Off in Multi-Objective Learning: Optimization,"
            " Generalization and Conflict-Avoidance",
            "NeurIPS 2023",
            "https://arxiv.org/abs/2305.20057",
        ),
        reads="gram",
        scale="mean",
        state="tasks",
        promises="symmetric rotates agrees ignores_absent",
    ),
    "sdmgrad": row(
        sdmgrad.sdmgrad,
        (
            "Direction-oriented Multi-objective Learning: Simple and Provable"
            " Stochastic Algorithms",
            "NeurIPS 2023",
            "https://arxiv.org/abs/2305.18409",
        ),
        reads="gram",
        scale="mean",
        state="tasks",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "m_config": row(
        m_config.m_config,
        (
            "ConFIG: Towards Conflict-free Training of Physics Informed Neural"
            " Networks",
            "ICLR 2025",
            "https://arxiv.org/abs/2408.11104",
        ),
        reads="gradients",
        scale="own",
        state="T x P",
        promises="symmetric",
    ),
    "imgrad": row(
        imgrad.imgrad,
        (
            "Injecting Imbalance Sensitivity for Multi-Task Learning",
            "IJCAI 2025",
            "https://arxiv.org/abs/2503.08006",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "mmpareto": row(
        mmpareto.mmpareto,
        (
            "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance",
            "ICML 2024",
            "https://arxiv.org/abs/2405.17730",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scales stationary never_conflicts agrees"
        " ignores_absent",
    ),
    "fedmgda": row(
        fedmgda.fedmgda,
        (
            "FedMGDA+: Federated Learning meets Multi-objective Optimization",
            "IEEE TNSE 2022",
            "https://arxiv.org/abs/2006.11489",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scale_free agrees ignores_absent",
    ),
    "pareto_mtl": row(
        pareto_mtl.pareto_mtl,
        (
            "Pareto Multi-Task Learning",
            "NeurIPS 2019",
            "https://arxiv.org/abs/1912.12854",
        ),
        reads="gram losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales ignores_absent",
    ),
    "epo": row(
        epo.epo,
        (
            "Multi-Task Learning with User Preferences: Gradient Descent with"
            " Controlled Ascent in Pareto Optimization",
            "ICML 2020",
            "https://proceedings.mlr.press/v119/mahapatra20a.html",
        ),
        reads="gram losses",
        scale="mean",
        promises="rotates scales agrees ignores_absent",
    ),
    "ferero": row(
        ferero.ferero,
        (
            "FERERO: A Flexible Framework for Preference-Guided Multi-Objective"
            " Learning",
            "NeurIPS 2024",
            "https://arxiv.org/abs/2412.01773",
        ),
        reads="gram losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates ignores_absent",
    ),
}
