"""Figures."""

import math
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np

from examples import runs
from examples.pinn import problems
from examples.pinn.problems import Problem

CUTS = (0.2, 0.45, 0.6, 0.9)  # Of the second input, where outputs are drawn as lines.


def plot_curves(folder: pathlib.Path, problem: Problem, title: str) -> None:
    """Losses, relative errors and the smallest cosine, over the steps."""
    rows = runs.read(folder / "log.csv")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    panels = {
        "losses": problem.tasks,
        "relative error": [f"error_{name}" for name in problem.outputs],
        "smallest cosine of two tasks": ["cosine"],
    }
    for axis, (name, columns) in zip(axes, panels.items(), strict=True):
        for column in columns:
            points = [(row["step"], row[column]) for row in rows]
            points = [point for point in points if not math.isnan(point[1])]
            style = {"lw": 0.8} if name == "losses" else {"marker": "o", "ms": 3}
            axis.plot(*zip(*points), label=column, **style)
        axis.set(xlabel="step", title=name)
        axis.spines[["top", "right"]].set_visible(False)
        if columns == ["cosine"]:
            axis.set(ylim=(-1.05, 1.05))
            axis.axhline(0, color="gray", lw=0.5)
        else:
            axis.set_yscale("log")
            axis.legend(
                frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
            )
    figure.suptitle(title)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def plot_solution(
    folder: pathlib.Path, problem: Problem, found: jax.Array, title: str
) -> None:
    """Each output on the grid: known, found, their difference, and along cuts."""
    outputs = problem.outputs
    known = problem.solution(problems.make_grid(problem))
    as_images = lambda x: np.asarray(x).T.reshape(len(outputs), *problem.grid)
    figure, axes = plt.subplots(
        len(outputs),
        4,
        figsize=(14, 2.6 * len(outputs) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    (left, right), (bottom, top) = zip(problem.low, problem.high)
    first, second = problem.inputs
    x, y = map(np.linspace, problem.low, problem.high, problem.grid)
    for line, name, a, b in zip(axes, outputs, as_images(known), as_images(found)):
        bound = np.abs(a).max()
        error = np.abs(b - a)
        size = np.linalg.norm(error) / np.linalg.norm(a)
        for axis, image, label, kind in (
            (line[0], a, f"{name}, known", {"vmin": -bound, "vmax": bound}),
            (line[1], b, f"{name}, found", {"vmin": -bound, "vmax": bound}),
            (line[2], error, f"absolute error ({size:.2g} of the norm)", {"vmin": 0}),
        ):
            shown = axis.imshow(
                image.T,
                cmap="viridis" if kind == {"vmin": 0} else "RdBu_r",
                origin="lower",
                extent=(left, right, bottom, top),
                aspect="auto",
                **kind,
            )
            axis.set(title=label, xlabel=first, ylabel=second)
            figure.colorbar(shown, ax=axis)
        for number, cut in enumerate(CUTS):
            place = round(cut * (len(y) - 1))
            color = f"C{number}"
            line[3].plot(x, a[:, place], color=color, lw=3, alpha=0.35)
            label = f"{second} = {y[place]:.3g}"
            line[3].plot(x, b[:, place], color=color, lw=1, label=label)
        line[3].set(title="known (broad) and found", xlabel=first)
        line[3].legend(frameon=False, fontsize="small")
        line[3].spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(folder / "solution.png", dpi=110)
    plt.close(figure)
