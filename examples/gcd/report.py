"""Accuracy, diagnostics and figures."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from examples.runs import read


def accuracy(
    truth: np.ndarray, prediction: np.ndarray, num_known: int, balanced: bool = False
) -> dict[str, float]:
    """Accuracy of clusters on all, known (old) and novel (new) classes.

    One assignment of clusters to classes serves all three: the one that matches
    most samples (Hungarian method).

    Args:
      truth: class of each unlabelled sample, known classes first.
      prediction: cluster of each sample.
      num_known: number of known classes.
      balanced: average over classes instead of samples ("v2b").

    Returns:
      `all`, `old` and `new`; NaN for a group without samples.
    """
    size = max(prediction.max(), truth.max()) + 1
    counts = np.zeros((size, size), int)
    np.add.at(counts, (prediction, truth), 1)
    clusters, classes = optimize.linear_sum_assignment(counts, maximize=True)
    matched = np.zeros(size)
    matched[classes] = counts[clusters, classes]
    present = np.bincount(truth, minlength=size)
    old = np.arange(size) < num_known

    def share(group):
        group = group & (present > 0)
        if not group.any():
            return math.nan
        if balanced:
            return float((matched[group] / present[group]).mean())
        return float(matched[group].sum() / present[group].sum())

    return {"all": share(old | ~old), "old": share(old), "new": share(~old)}


def gradient_deviation(labelled, total) -> jax.Array:
    """GDC: one minus the cosine between labelled and total gradient; in [0, 2]."""
    dot = lambda a, b: sum(
        jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )
    norms = jnp.sqrt(dot(labelled, labelled)) * jnp.sqrt(dot(total, total))
    cosine = dot(labelled, total) / jnp.where(norms == 0, 1, norms)
    return jnp.where(norms == 0, jnp.nan, 1 - jnp.clip(cosine, -1, 1))


def subspace_overlap(known: np.ndarray, novel: np.ndarray, k: int = 16) -> float:
    """SOC: share of novel features in the known ones' first k directions; in [0, 1].

    Both are normalised by row and centred at the known mean.
    """
    if len(novel) == 0:
        return math.nan
    known, novel = (
        z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        for z in (known, novel)
    )
    center = known.mean(0, keepdims=True)
    known, novel = known - center, novel - center
    _, directions = np.linalg.eigh(known.T @ known)  # Of ascending eigenvalues.
    first = directions[:, ::-1][:, : min(k, len(known))]
    return float(((novel @ first) ** 2).sum() / (novel**2).sum())


def mean_of(rows: list[dict[str, float]], column: str) -> float:
    """Mean of a column over the rows that have it; NaN if none has."""
    values = [row[column] for row in rows if not math.isnan(row[column])]
    return float(np.mean(values)) if values else math.nan


def plot_curves(out: pathlib.Path, title: str) -> None:
    """Accuracy over epochs, GDC and SOC over the first steps."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.5))
    epochs, steps = read(out / "epochs.csv"), read(out / "steps.csv")
    for name in "all", "old", "new":
        x, y = [row["epoch"] for row in epochs], [row[name] for row in epochs]
        left.plot(x, y, marker=".", label=name.capitalize())
    left.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1), title=title)
    left.set_xlim(left=0)  # One evaluation alone would show a range of its own.
    left.legend()
    for axis, name in (middle, "gdc"), (right, "soc"):
        rows = [row for row in steps if not math.isnan(row[name])]
        axis.plot([row["step"] for row in rows], [row[name] for row in rows])
        axis.set(
            xlabel="step", ylabel=name.upper(), title=f"{name.upper()}, low is good"
        )
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


def plot_features(
    out: pathlib.Path,
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    num_known: int,
) -> None:
    """Directions of features, of the reference and after discovery, in one plane.

    Known classes are gray; of the novel ones, the first five have a colour each.
    """
    import matplotlib.pyplot as plt
    from sklearn.decomposition import PCA

    unit = lambda z: z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    clouds = {"reference model": unit(before), "after discovery": unit(after)}
    plane = PCA(2, random_state=0).fit(np.concatenate(list(clouds.values())))
    novel = np.unique(labels[labels >= num_known])
    groups = {"known": ("0.75", labels < num_known)}
    for number, label in enumerate(novel[:5]):
        groups[f"class {label}"] = (f"C{number}", labels == label)
    if len(novel) > 5:
        groups["other novel"] = ("0.3", labels > novel[4])
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (title, cloud) in zip(axes, clouds.items()):
        points = plane.transform(cloud)
        for name, (color, rows) in groups.items():
            axis.plot(*points[rows].T, ".", ms=3, color=color, label=name)
        axis.set(title=title, xticks=[], yticks=[])
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(groups),
        markerscale=3,
    )
    figure.savefig(out / "features.png", dpi=120)
    plt.close(figure)
