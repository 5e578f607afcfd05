"""Figures."""

import math
import pathlib

import jax
import numpy as np

from examples import runs

Pictures = np.ndarray | jax.Array
TITLES = {"l1": "L1", "ssim": "1 - SSIM", "cosine": "smallest cosine of two tasks"}


def plot_curves(folder: pathlib.Path, tasks: list[str], title: str) -> None:
    """Losses and the cosine between the gradients of the tasks, over the steps."""
    import matplotlib.pyplot as plt

    rows = runs.read(folder / "log.csv")
    panels = tasks if math.isnan(rows[0]["cosine"]) else [*tasks, "cosine"]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, name in zip(axes, panels, strict=True):
        for column, style in ((name, "-"), (f"valid_{name}", "o-")):
            rows_with = [r for r in rows if not math.isnan(r.get(column, math.nan))]
            points = [(row["step"], row[column]) for row in rows_with]
            if points:
                alpha = 0.5 if style == "-" else 1
                label = "validation" if style == "o-" else "training"
                axis.plot(*zip(*points), style, ms=3, alpha=alpha, label=label)
        axis.set(xlabel="step", title=TITLES.get(name, name))
        axis.spines[["top", "right"]].set_visible(False)
        if name == "cosine":
            axis.set(ylim=(-1.05, 1.05))
            axis.axhline(0, color="gray", lw=0.5)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def plot_reconstructions(
    folder: pathlib.Path, rows: dict[str, Pictures], title: str
) -> None:
    """The first ten images of each row, in [0, 1]."""
    import matplotlib.pyplot as plt

    columns = min(10, *map(len, rows.values()))
    size = (columns + 1.2, len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures):
            picture = np.squeeze(np.clip(picture, 0, 1))  # Gray has no third axis.
            axis.imshow(picture, "gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    figure.tight_layout(pad=0.3)
    figure.savefig(folder / "reconstructions.png", dpi=120)
    plt.close(figure)


def plot_differences(
    file: pathlib.Path, tables: dict[str, dict[str, dict[str, tuple[float, float]]]]
) -> None:
    """Dots with error bars: how far each row of a table is from its yardstick.

    Args:
      file: of the figure.
      tables: by title, then row, then loss: mean and standard deviation.
    """
    import matplotlib.pyplot as plt

    losses = list(next(iter(next(iter(tables.values())).values())))
    figure, axes = plt.subplots(
        len(tables),
        len(losses),
        figsize=(4.5 * len(losses), 2.6 * len(tables)),
        sharex="col",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, (title, rows) in zip(axes, tables.items(), strict=True):
        places = np.arange(len(rows))[::-1]
        for axis, loss in zip(line, losses, strict=True):
            means, deviations = zip(*(row[loss] for row in rows.values()))
            axis.errorbar(means, places, xerr=deviations, fmt="o", ms=5, capsize=3)
            axis.axvline(0, color="gray", lw=0.8)
            axis.set_title(f"{title}: {TITLES[loss]}", loc="left", fontsize=10)
            axis.set_yticks(places, list(rows))
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("difference from the sum; left is better")
    figure.savefig(file, dpi=110)
    plt.close(figure)
