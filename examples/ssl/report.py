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
    folder: pathlib.Path,
    seen: Pictures,
    made: dict[str, Pictures],
    original: Pictures,
    title: str = "",
    columns: int = 10,
) -> None:
    """Rows of images in [0, 1]: seen by the models, made by each, and the original."""
    import matplotlib.pyplot as plt

    rows = {"seen": seen, **made, "original": original}
    columns = min(columns, len(original))
    size = (columns + 1.2, len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures):
            picture = np.squeeze(np.clip(picture, 0, 1))  # Gray has no third axis.
            axis.imshow(picture, "gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        place = {"rotation": 0, "ha": "right", "va": "center"}
        line[0].set_ylabel(name.replace(", ", ",\n"), **place)
    figure.suptitle(title)
    figure.tight_layout(pad=0.3)
    figure.savefig(folder / "reconstructions.png", dpi=120)
    plt.close(figure)
