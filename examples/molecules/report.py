"""Figures."""

import math
import pathlib

import numpy as np

from examples import runs
from examples.molecules.data import Molecules
from examples.molecules.model import FEW


def columns(molecules: Molecules) -> list[str]:
    """Of the log: the loss of each task and its score, or their means if many."""
    tasks = molecules.tasks
    few = len(tasks) <= FEW
    scored = [task for task, yes in zip(tasks, molecules.scored()) if yes and few]
    losses = tasks if few else ["loss"]
    return ["step", *losses, "cosine", *(f"valid_{x}" for x in [*scored, "mean"])]


def plot_curves(folder: pathlib.Path, molecules: Molecules, title: str) -> None:
    """Training losses, scores on the validation split and conflict, over the steps."""
    import matplotlib.pyplot as plt

    rows = runs.read(folder / "log.csv")
    names = columns(molecules)
    middle = names.index("cosine")
    losses, scores = names[1:middle], names[middle + 1 :]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    colours = plt.colormaps["tab20"].colors
    for axis, chosen in zip(axes, (losses, scores, ["cosine"])):
        for number, column in enumerate(chosen):
            points = [(r["step"], r[column]) for r in rows if not math.isnan(r[column])]
            steps, values = np.array(points).T
            if axis is axes[0]:  # Noise of single batches hides what matters.
                width = max(1, len(steps) // 50)
                values = np.convolve(values, np.full(width, 1 / width), "valid")
                steps = steps[len(steps) - len(values) :]
            if axis is axes[1] and molecules.spread is not None:
                unit = dict(zip(molecules.tasks, molecules.spread))
                values = values / unit.get(column.removeprefix("valid_"), 1)
            label = column.removeprefix("valid_")
            mean = {"color": "black", "lw": 2} if label == "mean" else {}
            style = {"color": colours[number % 20], "lw": 1.2} | mean
            axis.plot(steps, values, label=label, **style)
        axis.set(xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(title="training losses", yscale="log")
    axes[1].set(title=f"validation: {_score(molecules)}")
    axes[1].legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    axes[2].set(title="smallest cosine of two tasks", ylim=(-1.05, 1.05))
    axes[2].axhline(0, color="gray", lw=0.5)
    figure.suptitle(title)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def plot_tasks(
    folder: pathlib.Path, molecules: Molecules, scores: np.ndarray, title: str
) -> None:
    """Scores on the test split: a bar for each task, or a histogram if they are many.

    Args:
      folder: of the figure.
      molecules: the data.
      scores: of the tasks, in their units.
      title: of the figure.
    """
    import matplotlib.pyplot as plt

    found = np.flatnonzero(molecules.scored())
    values = scores[found]
    if molecules.spread is not None:
        values = values / molecules.spread[found]
    few = len(molecules.tasks) <= FEW
    height = 0.28 * len(found) + 1.2 if few else 3.2
    figure, axis = plt.subplots(figsize=(6, height), layout="constrained")
    if few:
        bars = axis.barh([molecules.tasks[i] for i in found], values, color="#0072B2")
        texts = [f"{x:.4g}" for x in scores[found]]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.bar_label(bars, texts, padding=3, fontsize=8, bbox=box)
        axis.invert_yaxis()
    else:
        axis.hist(values, bins=40, color="#0072B2")
        axis.set_ylabel("tasks")
    guess = {"color": "gray", "lw": 0.8, "ls": "--"}
    axis.axvline(values.mean(), color="black", lw=1, label="mean")
    if molecules.spread is None:
        axis.axvline(0.5, label="by chance", **guess)
    axis.set(xlabel=f"test: {_score(molecules)}", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(folder / "tasks.png", dpi=120)
    plt.close(figure)


def _score(molecules):
    return "ROC-AUC" if molecules.spread is None else "MAE / standard deviation"
