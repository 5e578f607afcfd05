"""Rows of the family balance; see :mod:`optax_mtl.methods.balance`."""

from optax_mtl.catalog.entry import Entry, row
from optax_mtl.methods.balance import (
    adatask,
    db_mtl,
    energy_gate,
    excess_mtl,
    fairgrad,
    gradnorm,
    imtl,
    imtl_g,
    inverse_norm,
    loss_balancer,
    lr_annealing,
    nash_mtl,
    pivrg,
    sam_gs,
)

ROWS: dict[str, Entry] = {
    "energy_gate": row(
        energy_gate.energy_gate,
        ("A heuristic of this library", "unpublished", ""),
        reads="gradients",
        scale="sum",
        state="P",
        promises="symmetric scales agrees ignores_absent",
    ),
    "sam_gs": row(
        sam_gs.sam_gs,
        (
            "Gradient Similarity Surgery in Multi-Task Deep Learning",
            "2025",
            "https://arxiv.org/abs/2506.06130",
        ),
        reads="gradients",
        scale="own",
        state="T x P",
        promises="symmetric ignores_absent",
    ),
    "fairgrad": row(
        fairgrad.fairgrad,
        (
            "Fair Resource Allocation in Multi-Task Learning",
            "ICML 2024",
            "https://arxiv.org/abs/2402.15638",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates never_conflicts stationary agrees ignores_absent",
    ),
    "imtl_g": row(
        imtl_g.imtl_g,
        (
            "Towards Impartial Multi-task Learning",
            "ICLR 2021",
            "https://openreview.net/forum?id=IMPnRXEWpvr",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales scale_free agrees ignores_absent",
    ),
    "nash_mtl": row(
        nash_mtl.nash_mtl,
        (
            "Multi-Task Learning as a Bargaining Game",
            "ICML 2022",
            "https://arxiv.org/abs/2202.01017",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scale_free never_conflicts stationary agrees"
        " ignores_absent",
    ),
    "inverse_norm": row(
        inverse_norm.inverse_norm,
        (
            "Dual-Balancing for Multi-Task Learning",
            "2023",
            "https://arxiv.org/abs/2308.12029",
        ),
        reads="gram",
        scale="sum",
        promises="symmetric rotates scales scale_free linear_in_scales agrees"
        " ignores_absent",
    ),
    "gradnorm": row(
        gradnorm.gradnorm,
        (
            "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep"
            " Multitask Networks",
            "ICML 2018",
            "https://arxiv.org/abs/1711.02257",
        ),
        reads="gram losses",
        scale="sum",
        state="tasks",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "db_mtl": row(
        db_mtl.db_mtl,
        (
            "Dual-Balancing for Multi-Task Learning",
            "2023",
            "https://arxiv.org/abs/2308.12029",
        ),
        reads="gradients losses",
        scale="own",
        state="T x P",
        promises="symmetric rotates scales scale_free ignores_absent",
    ),
    "imtl": row(
        imtl.imtl,
        (
            "Towards Impartial Multi-task Learning",
            "ICLR 2021",
            "https://openreview.net/forum?id=IMPnRXEWpvr",
        ),
        reads="gram losses",
        scale="own",
        state="tasks",
        promises="symmetric rotates scales scale_free agrees ignores_absent",
    ),
    "excess_mtl": row(
        excess_mtl.excess_mtl,
        (
            "Robust Multi-Task Learning with Excess Risks",
            "ICML 2024",
            "https://arxiv.org/abs/2402.02009",
        ),
        reads="gradients",
        scale="sum",
        state="T x P",
        promises="symmetric scales agrees ignores_absent",
    ),
    "adatask": row(
        adatask.adatask,
        (
            "AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task"
            " Learning",
            "AAAI 2023",
            "https://arxiv.org/abs/2211.15055",
        ),
        reads="gradients",
        scale="own",
        state="T x P",
        promises="symmetric ignores_absent",
    ),
    "pivrg": row(
        pivrg.pivrg,
        (
            "Revisiting Fairness in Multitask Learning: A Performance-Driven Approach"
            " for Variance Reduction",
            "CVPR 2025",
            "https://openaccess.thecvf.com/content/CVPR2025/papers/Qin_Revisiting_Fairness_in_Multitask_Learning_A_Performance-Driven_Approach_for_Variance_CVPR_2025_paper.pdf",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates never_conflicts stationary agrees ignores_absent",
    ),
    "loss_balancer": row(
        loss_balancer.loss_balancer,
        (
            "High Fidelity Neural Audio Compression",
            "TMLR 2023",
            "https://arxiv.org/abs/2210.13438",
        ),
        reads="gram",
        scale="own",
        state="tasks",
        promises="symmetric rotates scale_free agrees ignores_absent",
    ),
    "lr_annealing": row(
        lr_annealing.lr_annealing,
        (
            "Understanding and Mitigating Gradient Flow Pathologies in"
            " Physics-Informed Neural Networks",
            "SISC 2021",
            "https://arxiv.org/abs/2001.04536",
        ),
        reads="gradients",
        scale="own",
        state="tasks",
        promises="scales agrees",
    ),
}
