"""What each method is, reads and promises: one row a method."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

import optax

from optax_mtl.methods import (
    adatask,
    aligned_mtl,
    bloop,
    cagrad,
    config,
    coordinate_median,
    cosine_gating,
    cosmos,
    db_mtl,
    dualproj,
    dwa,
    dynamic_barrier,
    energy_gate,
    excess_mtl,
    fairgrad,
    famo,
    gcond,
    geometric_median,
    gls,
    graddrop,
    gradnorm,
    gradvac,
    igb,
    imtl,
    imtl_g,
    imtl_l,
    inverse_norm,
    krum,
    linear,
    m_config,
    metabalance,
    mgda,
    moco,
    modo,
    nash_mtl,
    pbi,
    pcd,
    pcgrad,
    priority_projection,
    random_weights,
    sam_gs,
    scale_invariant,
    sdmgrad,
    stch,
    trimmed_mean,
    uncertainty_weighting,
    upgrad,
    uw_so,
)

Factory = Callable[..., optax.GradientTransformationExtraArgs]


def _hint(name: str, known: Iterable[str]) -> str:
    """What the user may have meant."""
    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(sorted(known)) or 'none'}"


class Entry(NamedTuple):
    """A row of :data:`METHODS`."""

    make: Factory  # From num_tasks and, by keyword, the options of the method.
    family: str  # "baseline", "conflict", "balance", "loss", "priority" or "robust".
    paper: tuple[str, str, str]  # Title, venue and year, address.
    reads: frozenset[str]  # What decides the update: gram, losses, gradients.
    scale: str  # For T equal gradients g: "sum" is T g, "mean" is g, or "own".
    state: str  # Size per parameter: "none", "tasks" (T x T at most), "P" or "T x P".
    promises: frozenset[str]  # Properties for any input; names of tests.


def _row(
    factory: Factory,
    family: str,
    paper: tuple[str, str, str],
    *,
    reads: str,
    scale: str,
    state: str = "none",
    promises: str = "",
) -> Entry:
    """An entry; the factory gets the number of tasks if it takes it."""
    known = list(inspect.signature(factory).parameters)

    def make(num_tasks: int, **options: Any) -> optax.GradientTransformationExtraArgs:
        for option in options:
            if option not in known:
                hint = _hint(option, [name for name in known if name != "num_tasks"])
                raise TypeError(f"{factory.__name__} has no option {option!r}; {hint}")
        if "num_tasks" in known:
            options["num_tasks"] = num_tasks
        return factory(**options)

    return Entry(
        make=make,
        family=family,
        paper=paper,
        reads=frozenset(reads.split()),
        scale=scale,
        state=state,
        promises=frozenset(promises.split()),
    )


_UNITARY = (
    "In Defense of the Unitary Scalarization for Deep Multi-Task Learning",
    "NeurIPS 2022",
    "https://arxiv.org/abs/2201.04122",
)

METHODS: dict[str, Entry] = {
    # Baselines: weights that depend on nothing.
    "linear": _row(
        linear.linear,
        "baseline",
        _UNITARY,
        reads="",
        scale="sum",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "mean": _row(
        linear.mean,
        "baseline",
        _UNITARY,
        reads="",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales agrees",
    ),
    "random_weights": _row(
        random_weights.random_weights,
        "baseline",
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
    # Conflict: the directions of the gradients.
    "cagrad": _row(
        cagrad.cagrad,
        "conflict",
        (
            "Conflict-Averse Gradient Descent for Multi-task Learning",
            "NeurIPS 2021",
            "https://arxiv.org/abs/2110.14048",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "pcgrad": _row(
        pcgrad.pcgrad,
        "conflict",
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
    "aligned_mtl": _row(
        aligned_mtl.aligned_mtl,
        "conflict",
        (
            "Independent Component Alignment for Multi-Task Learning",
            "CVPR 2023",
            "https://arxiv.org/abs/2305.19000",
        ),
        reads="gram",
        scale="sum",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "config": _row(
        config.config,
        "conflict",
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
    "dualproj": _row(
        dualproj.dualproj,
        "conflict",
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
    "gcond": _row(
        gcond.gcond,
        "conflict",
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
    "graddrop": _row(
        graddrop.graddrop,
        "conflict",
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
    "gradvac": _row(
        gradvac.gradvac,
        "conflict",
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
    "mgda": _row(
        mgda.mgda,
        "conflict",
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
    "upgrad": _row(
        upgrad.upgrad,
        "conflict",
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
    "moco": _row(
        moco.moco,
        "conflict",
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
    "modo": _row(
        modo.modo,
        "conflict",
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
    "sdmgrad": _row(
        sdmgrad.sdmgrad,
        "conflict",
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
    "m_config": _row(
        m_config.m_config,
        "conflict",
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
    # Balance: the magnitudes of the gradients.
    "energy_gate": _row(
        energy_gate.energy_gate,
        "balance",
        ("A heuristic of this library", "unpublished", ""),
        reads="gradients",
        scale="sum",
        state="P",
        promises="symmetric scales agrees ignores_absent",
    ),
    "sam_gs": _row(
        sam_gs.sam_gs,
        "balance",
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
    "fairgrad": _row(
        fairgrad.fairgrad,
        "balance",
        (
            "Fair Resource Allocation in Multi-Task Learning",
            "ICML 2024",
            "https://arxiv.org/abs/2402.15638",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates never_conflicts stationary agrees ignores_absent",
    ),
    "imtl_g": _row(
        imtl_g.imtl_g,
        "balance",
        (
            "Towards Impartial Multi-task Learning",
            "ICLR 2021",
            "https://openreview.net/forum?id=IMPnRXEWpvr",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales scale_free agrees ignores_absent",
    ),
    "nash_mtl": _row(
        nash_mtl.nash_mtl,
        "balance",
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
    "inverse_norm": _row(
        inverse_norm.inverse_norm,
        "balance",
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
    "gradnorm": _row(
        gradnorm.gradnorm,
        "balance",
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
    "db_mtl": _row(
        db_mtl.db_mtl,
        "balance",
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
    "imtl": _row(
        imtl.imtl,
        "balance",
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
    "excess_mtl": _row(
        excess_mtl.excess_mtl,
        "balance",
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
    "adatask": _row(
        adatask.adatask,
        "balance",
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
    # Losses: weights from the losses alone, for the price of one backward pass.
    "dwa": _row(
        dwa.dwa,
        "loss",
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
    "gls": _row(
        gls.gls,
        "loss",
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
    "uncertainty_weighting": _row(
        uncertainty_weighting.uncertainty_weighting,
        "loss",
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
    "imtl_l": _row(
        imtl_l.imtl_l,
        "loss",
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
    "scale_invariant": _row(
        scale_invariant.scale_invariant,
        "loss",
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
    "stch": _row(
        stch.stch,
        "loss",
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
    "famo": _row(
        famo.famo,
        "loss",
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
    "igb": _row(
        igb.igb,
        "loss",
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
    "cosmos": _row(
        cosmos.cosmos,
        "loss",
        (
            "Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
            "ICDM 2021",
            "https://arxiv.org/abs/2103.13392",
        ),
        reads="losses",
        scale="own",
        promises="symmetric rotates scales linear_in_scales ignores_absent",
    ),
    "pbi": _row(
        pbi.pbi,
        "loss",
        (
            "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition",
            "IEEE TEVC 2007",
            "https://doi.org/10.1109/TEVC.2007.892759",
        ),
        reads="losses",
        scale="own",
        promises="symmetric rotates scales linear_in_scales ignores_absent",
    ),
    "uw_so": _row(
        uw_so.uw_so,
        "loss",
        (
            "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
            "2024",
            "https://arxiv.org/abs/2408.07985",
        ),
        reads="losses",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    # Priority: one task matters more than the others.
    "bloop": _row(
        bloop.bloop,
        "priority",
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
    "cosine_gating": _row(
        cosine_gating.cosine_gating,
        "priority",
        (
            "Adapting Auxiliary Losses Using Gradient Similarity",
            "2018",
            "https://arxiv.org/abs/1812.02224",
        ),
        reads="gram",
        scale="sum",
        promises="rotates scales linear_in_scales agrees",
    ),
    "dynamic_barrier": _row(
        dynamic_barrier.dynamic_barrier,
        "priority",
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
    "metabalance": _row(
        metabalance.metabalance,
        "priority",
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
    "pcd": _row(
        pcd.pcd,
        "priority",
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
    "priority_projection": _row(
        priority_projection.priority_projection,
        "priority",
        (
            "Efficient Lifelong Learning with A-GEM",
            "ICLR 2019",
            "https://arxiv.org/abs/1812.00420",
        ),
        reads="gram",
        scale="sum",
        promises="rotates scales linear_in_scales agrees ignores_absent",
    ),
    # Robust: averages that a few wrong gradients do not move far.
    "coordinate_median": _row(
        coordinate_median.coordinate_median,
        "robust",
        (
            "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            "ICML 2018",
            "https://arxiv.org/abs/1803.01498",
        ),
        reads="gradients",
        scale="mean",
        promises="symmetric scales agrees ignores_absent",
    ),
    "geometric_median": _row(
        geometric_median.geometric_median,
        "robust",
        (
            "Robust Aggregation for Federated Learning",
            "2019",
            "https://arxiv.org/abs/1912.13445",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "krum": _row(
        krum.krum,
        "robust",
        (
            "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            "NeurIPS 2017",
            "https://arxiv.org/abs/1703.02757",
        ),
        reads="gram",
        scale="mean",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "trimmed_mean": _row(
        trimmed_mean.trimmed_mean,
        "robust",
        (
            "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            "ICML 2018",
            "https://arxiv.org/abs/1803.01498",
        ),
        reads="gradients",
        scale="mean",
        promises="symmetric scales agrees ignores_absent",
    ),
}


def get(
    name: str, num_tasks: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes a method by its name.

    Args:
      name: a key of :data:`METHODS`.
      num_tasks: number of tasks, T.
      **options: arguments of the method.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a name that is not in the catalog.
      TypeError: for an option that the method does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.get("pcgrad", num_tasks=2, key=3)
      >>> optax_mtl.get("pcgradd", num_tasks=2)
      Traceback (most recent call last):
      ...
      ValueError: there is no method 'pcgradd'; did you mean 'pcgrad'?
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; {_hint(name, METHODS)}")
    return METHODS[name].make(num_tasks, **options)


def as_markdown() -> str:
    """The catalog as the table in the README."""
    yes = lambda condition: "yes" if condition else ""
    columns = (
        "method",
        "family",
        "paper",
        "never conflicts",
        "scale-free",
        "needs losses",
        "one backward",
        "extra memory",
        "scale",
    )
    row = lambda cells: f"| {' | '.join(cells)} |"
    lines = [row(columns), "|" + "---|" * len(columns)]
    for name, entry in METHODS.items():
        _, venue, address = entry.paper
        cells = (
            f"`{name}`",
            entry.family,
            f"[{venue}]({address})" if address else venue,
            yes("never_conflicts" in entry.promises),
            yes("scale_free" in entry.promises),
            yes("losses" in entry.reads),
            yes(not entry.reads & {"gram", "gradients"}),
            "" if entry.state in ("none", "tasks") else entry.state,
            entry.scale,
        )
        lines.append(row(cells))
    return "\n".join(lines)
