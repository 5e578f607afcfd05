"""The table and the figure of the quickstart."""

import itertools
import pathlib
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_mtl
from examples.quickstart import config, model

METHOD_COLORS = "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377".split()
TASK_COLORS = ("#3b6fb6", "#e08a2e", "#4f9d69")
PAIRS = {"left, right": (0, 1), "left, draw": (0, 2), "right, draw": (1, 2)}
PAIR_COLORS = ("#8c6bb1", "#c8553d", "#2a9d8f")


class Run(NamedTuple):
    """What one training run left behind."""

    losses: np.ndarray  # Before each step, shape `(steps, tasks)`.
    gram: np.ndarray  # Of the gradients of the trunk, shape `(steps, tasks, tasks)`.
    scores: np.ndarray  # On the test set, shape `(evaluations, tasks)`.


Runs = dict[str, list[Run]]  # By method, one run per seed.


def tuned(weight: float) -> str:
    """The name of a sum in which drawing has another weight."""
    return f"sum, draw x{weight:g}"


def label(name: str) -> str:
    """The name of a method as the reader knows it."""
    return "sum" if name == "linear" else name


def cosines(runs: list[Run]) -> np.ndarray:
    """Cosines of the pairs of tasks, shape `(seeds, steps, pairs)`."""
    gram = np.stack([run.gram for run in runs])
    full = jax.vmap(jax.vmap(optax_mtl.cosine_similarity))(gram)
    return np.stack([full[..., i, j] for i, j in PAIRS.values()], axis=-1)


def replay(method: optax.GradientTransformationExtraArgs, run: Run) -> np.ndarray:
    """The weights that the method gave the tasks, shape `(steps, tasks)`."""

    def step(state, measured):
        losses, gram = measured
        view = optax_mtl.GramView(len(losses), lambda: gram)
        weights, state = method.update(view, state, losses=losses)
        return state, weights

    _, weights = jax.lax.scan(step, method.init(None), (run.losses, run.gram))
    return np.asarray(weights)


def table(runs: Runs, seconds: dict[str, float]) -> str:
    """One row a method: scores, time per step and share of steps in conflict."""
    rows = [["method", *(f"{task} %" for task in model.TASKS), "time", "conflict"]]
    for name, seeds in runs.items():
        final = np.stack([run.scores[-1] for run in seeds])
        spread = [
            f"{m:.1f} ± {s:.1f}" for m, s in zip(final.mean(axis=0), final.std(axis=0))
        ]
        slower = seconds[name] / seconds["plain"]
        conflict = np.mean(cosines(seeds).min(axis=-1) < 0)
        rows.append([label(name), *spread, f"{slower:.1f}x", f"{conflict:.0%}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    line = lambda row: "  ".join(cell.rjust(w) for cell, w in zip(row, widths))
    return "\n".join(map(line, rows))


def figure(
    runs: Runs,
    methods: dict[str, optax.GradientTransformationExtraArgs],
    settings: config.Config,
) -> pathlib.Path:
    """Writes learning curves, cosines, the trade-off and the resolved weights."""
    plt.rcParams.update(
        {
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "font.size": 9,
            "legend.frameon": False,
        }
    )
    others = [name for name in settings.methods if name != "linear"]
    colors = dict.fromkeys(settings.methods, "0.2")
    colors |= zip(others, itertools.cycle(METHOD_COLORS))
    fig = plt.figure(figsize=(12, 9.6), layout="constrained")
    top, middle, bottom = fig.subfigures(3, height_ratios=(4, 4, 2.2), hspace=0.04)

    titles = ("left digit, accuracy (%)", "right digit, accuracy (%)")
    titles += ("drawing, variance explained (%)",)
    for task, (axes, title) in enumerate(zip(top.subplots(1, len(titles)), titles)):
        for name, color in colors.items():
            _curve(axes, runs[name], task, settings.eval_every, color, label(name))
        best = max(run.scores[:, task].max() for name in colors for run in runs[name])
        axes.set(title=title, xlabel="step", xlim=(0, settings.steps))
        axes.set_ylim(0, 1.05 * max(best, 1))  # Drawing starts far below zero.
    axes.legend(loc="upper left", fontsize=8)

    left, right = middle.subplots(1, 2, width_ratios=(1.4, 1))
    reference = settings.methods[0]
    _cosine_curves(left, runs[reference])
    left.set_title(f"cosine between task gradients in the trunk ({label(reference)})")
    _trade_off(right, runs, colors, settings)
    right.set_title("what each method settles for, each seed a dot")

    reads = {name: optax_mtl.METHODS[name].reads for name in settings.methods}
    shown = [name for name in settings.methods if "gradients" not in reads[name]]
    panels = bottom.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown):
        _weight_shares(axes, replay(methods[name], runs[name][0]))
        axes.set_title(label(name))
    panels[0].set_ylabel("share of the\nresolved weights")
    bottom.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    path = pathlib.Path(settings.out) / "quickstart.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


def _curve(axes, runs, task, eval_every, color, name):
    """Mean over the seeds, in the band of all seeds."""
    scores = np.stack([run.scores[:, task] for run in runs])
    steps = eval_every * np.arange(scores.shape[1])
    style = (
        {"lw": 2.2, "ls": (0, (4, 1.5)), "zorder": 3} if name == "sum" else {"lw": 1.5}
    )
    axes.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.1, lw=0)
    axes.plot(steps, scores.mean(0), color=color, label=name, **style)


def _cosine_curves(axes, runs):
    """Each step of each seed as a faint dot, their running mean as a line."""
    values = cosines(runs)
    steps = np.arange(values.shape[1])
    window = min(31, len(steps))
    for pair, (name, color) in enumerate(zip(PAIRS, PAIR_COLORS)):
        dots = values[..., pair]
        for seed in dots:
            axes.plot(steps, seed, ".", ms=2.5, alpha=0.25, color=color, mew=0)
        mean = np.convolve(dots.mean(0), np.full(window, 1 / window), mode="valid")
        share = np.mean(dots < 0)
        axes.plot(
            steps[window // 2 :][: len(mean)],
            mean,
            color=color,
            lw=2,
            label=f"{name}: negative in {share:.0%} of the steps",
        )
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set(xlabel="step", xlim=(0, len(steps)), ylim=(-1, 1))
    axes.legend(loc="upper right", fontsize=8)


def _trade_off(axes, runs, colors, settings):
    """Reading against drawing at the end; the tuned sums are joined by a line."""
    point = lambda run: (run.scores[-1, :2].mean(), run.scores[-1, 2])
    points = {name: np.array([point(run) for run in runs[name]]) for name in runs}
    weights = {tuned(weight): weight for weight in settings.draw_weights}
    if "linear" in runs:
        weights["linear"] = 1.0
    for name in weights:
        axes.plot(*points[name].mean(0), "o", color="0.7", ms=5)
    sums = sorted(weights, key=weights.get)
    front = np.array([points[name].mean(0) for name in sums]).reshape(-1, 2)
    axes.plot(
        *front.T, color="0.7", lw=1.5, zorder=1, label="sum with drawing weighted"
    )
    for name, xy in zip(sums, front):
        axes.annotate(
            f"{weights[name]:g} ", xy, ha="right", va="top", color="0.5", fontsize=8
        )
    for name, color in colors.items():
        axes.plot(*points[name].T, ".", color=color, ms=5, alpha=0.6)
        axes.plot(*points[name].mean(0), "o", color=color, ms=9, mec="white")
    axes.set(xlabel="reading, accuracy of both (%)", ylabel="drawing (%)")
    axes.legend(loc="lower left", fontsize=8)


def _weight_shares(axes, weights):
    """Stacked shares of the tasks, averaged over windows of steps."""
    windows = np.array_split(np.maximum(weights, 0), min(40, len(weights)))
    mean = np.stack([window.mean(0) for window in windows])
    shares = mean / mean.sum(axis=1, keepdims=True)
    steps = np.linspace(0, len(weights), len(shares))
    axes.stackplot(steps, shares.T, colors=TASK_COLORS, labels=model.TASKS)
    axes.set(xlim=(0, len(weights)), ylim=(0, 1), xlabel="step")
