"""Figures, with matplotlib (the extra ``plots``).

Each function takes arrays and optionally the axes to draw on, and returns the axes.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optax_mtl import scores
from optax_mtl.comparison import Comparison

# Okabe and Ito's colours, told apart by all eyes; then again with other markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "oD^vP*Xs"
GREY = {"color": "0.7", "zorder": 1}
SUM = {"color": "0.35", "marker": "s", "label": "sum"}
OPPOSED_TO_ALIGNED = "RdBu"  # Of cosines, from -1 to 1.
_MAX_PAIRS = 10  # Of more, a range is drawn.


def cosines(
    matrix: Any,
    names: Sequence[str] | None = None,
    ax: Any = None,
    numbers: bool = True,
) -> Any:
    """Draws the cosines between the gradients of the tasks as a heat map.

    Args:
      matrix: cosines, shape ``(T, T)``, such as ``conflicts(gram).cosines``.
      names: of the tasks; by default those numbered from 0.
      ax: axes of matplotlib; new ones by default.
      numbers: whether to write the cosines into the cells.

    Returns:
      The axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> from optax_mtl import plots
      >>> report = optax_mtl.conflicts(jnp.array([[18.0, -22], [-22, 38]]))
      >>> ax = plots.cosines(report.cosines, ["left", "right"])
    """
    matrix = np.asarray(matrix)
    names = _names_for(names, len(matrix))
    ax = _axes_for(ax, 2 + 0.5 * len(matrix), 1.2 + 0.45 * len(matrix))
    _map_of_cosines(ax, matrix, numbers)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    return ax


def groups(
    matrices: Any,
    groups: Sequence[str],
    names: Sequence[str] | None = None,
    ax: Any = None,
    numbers: bool = True,
) -> Any:
    """Draws the cosine of each pair of tasks in each layer or block.

    Args:
      matrices: cosines by group, shape ``(L, T, T)``, such as
        ``[r.cosines for r in conflicts_by_group(updates).values()]``.
      groups: their names.
      names: of the tasks; by default those numbered from 0.
      ax: axes of matplotlib; new ones by default.
      numbers: whether to write the cosines into the cells.

    Returns:
      The axes, with a row for each group, a column for each pair.
    """
    matrices = np.asarray(matrices)
    pairs = _pairs(_names_for(names, matrices.shape[-1]))
    table = np.stack([matrices[:, i, j] for i, j in pairs.values()], axis=1)
    ax = _axes_for(ax, 2 + 0.5 * len(pairs), 1.8 + 0.3 * len(groups))
    _map_of_cosines(ax, table, numbers)
    ax.set_xticks(range(len(pairs)), pairs, rotation=45, ha="right")
    ax.set_yticks(range(len(groups)), groups)
    return ax


def conflict(
    matrices: Any, steps: Any = None, names: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Draws the cosine of each pair of tasks over time.

    Args:
      matrices: cosines, shape ``(S, T, T)``.
      steps: of each, shape ``(S,)``; by default numbered from 0.
      names: of the tasks; by default those numbered from 0.
      ax: axes of matplotlib; new ones by default.

    Returns:
      The axes, with a line for each pair; of more than ten the most opposed one, the
      median and the range.
    """
    matrices = np.asarray(matrices)
    pairs = _pairs(_names_for(names, matrices.shape[-1]))
    table = np.stack([matrices[:, i, j] for i, j in pairs.values()], axis=1)
    steps = np.arange(len(table)) if steps is None else steps
    ax = _axes_for(ax, 3.5, 2.6)
    if len(pairs) > _MAX_PAIRS:
        lowest, highest = table.min(axis=1), table.max(axis=1)
        ax.fill_between(steps, lowest, highest, color="0.85", label="all pairs")
        ax.plot(steps, np.median(table, axis=1), color="0.35", label="median")
        ax.plot(steps, lowest, color=COLOURS[1], label="most opposed")
    else:
        _lines(ax, steps, table, pairs)
    ax.axhline(0, linewidth=0.8, **GREY)
    ax.set(ylim=(-1.05, 1.05), xlabel="step", ylabel="cosine of two tasks")
    ax.legend(fontsize="x-small")
    return ax


def weights(
    weights: Any, steps: Any = None, names: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Draws the weights of a method over time.

    Args:
      weights: shape ``(S, T)``, such as a :class:`~optax_mtl.Record` has in each step.
      steps: of each, shape ``(S,)``; by default numbered from 0.
      names: of the tasks; by default those numbered from 0.
      ax: axes of matplotlib; new ones by default.

    Returns:
      The axes, logarithmic where the weights span more than a decade.
    """
    weights = np.asarray(weights)
    steps = np.arange(len(weights)) if steps is None else steps
    ax = _axes_for(ax, 3.5, 2.6)
    _lines(ax, steps, weights, _names_for(names, weights.shape[1]))
    _scale(ax, "y", weights)
    ax.set(xlabel="step", ylabel="weight")
    ax.legend(fontsize="x-small")
    return ax


def losses(
    losses: Any, steps: Any = None, names: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Draws the losses of the tasks over time, with the spread of several runs.

    Args:
      losses: shape ``(S, T)``, or ``(R, S, T)`` of several runs.
      steps: of each, shape ``(S,)``; by default numbered from 0.
      names: of the tasks; by default those numbered from 0.
      ax: axes of matplotlib; new ones by default.

    Returns:
      The axes, with means over the runs and bands of a standard deviation; logarithmic
      where the losses span more than a decade.
    """
    runs = np.asarray(losses)
    runs = runs[None] if runs.ndim == 2 else runs
    steps = np.arange(runs.shape[1]) if steps is None else steps
    ax = _axes_for(ax, 3.5, 2.6)
    mean, spread = runs.mean(axis=0), runs.std(axis=0)
    _lines(ax, steps, mean, _names_for(names, runs.shape[2]))
    if len(runs) > 1:
        for task, colour in zip(range(runs.shape[2]), itertools.cycle(COLOURS)):
            low, high = (mean[:, task] + sign * spread[:, task] for sign in (-1, 1))
            # Below the smallest run a band has no meaning, nor on a logarithmic axis.
            low = np.maximum(low, runs[:, :, task].min(axis=0))
            ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    _scale(ax, "y", runs)
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(fontsize="x-small")
    return ax


def trade_off(
    points: Any,
    names: Sequence[str],
    metrics: Sequence[str] = ("", ""),
    static: Any = None,
    signs: Any = (1, 1),
    ax: Any = None,
) -> Any:
    """Draws two metrics of every method, beside those of static weightings.

    Args:
      points: shape ``(M, 2)``, or ``(M, R, 2)`` of several runs.
      names: of the methods.
      metrics: names of the two.
      static: those of static weightings, shape ``(N, 2)``. The ones that no other one
        beats in both are joined by a line.
      signs: of each metric: 1 where less is better, -1 where more is.
      ax: axes of matplotlib; new ones by default.

    Returns:
      The axes, with means over the runs and bars of a standard deviation.
    """
    points = np.asarray(points)
    runs = points[:, None] if points.ndim == 2 else points
    ax = _axes_for(ax, 3.5, 3.0)
    if static is not None:
        static = np.asarray(static)
        beaten = signs * static[None] < signs * static[:, None]
        front = static[~beaten.all(axis=2).any(axis=1)]
        front = front[np.argsort(front[:, 0])]
        ax.plot(*static.T, "o", markersize=4, **GREY, label="static weightings")
        ax.plot(*front.T, "-", linewidth=1, **GREY)
    means, spreads = runs.mean(axis=1), runs.std(axis=1)
    methods = [name for name in names if name != "sum"]
    for i, name in enumerate(names):
        style = SUM if name == "sum" else _style(methods.index(name), name)
        bars = {} if runs.shape[1] == 1 else dict(zip(("xerr", "yerr"), spreads[i]))
        ax.errorbar(*means[i], **bars, capsize=2, linestyle="", **style)
    ax.set(xlabel=metrics[0], ylabel=metrics[1])
    for metric, axis in enumerate("xy"):
        shown = runs[..., metric].ravel()
        others = [] if static is None else static[:, metric]
        _scale(ax, axis, np.concatenate([shown, others]))
    ax.legend(fontsize="x-small")
    return ax


def paths(
    losses_fn: Callable[[Any], Any],
    paths: Any,
    extent: tuple[float, float, float, float] = (-11, 11, -11, 11),
    ax: Any = None,
) -> Any:
    """Draws how a method descends on a landscape of two parameters.

    Args:
      losses_fn: from parameters, shape ``(2,)``, to the losses.
      paths: shape ``(N, S, 2)``: N paths, each from its dot to its star.
      extent: smallest and largest value of the first and of the second parameter.
      ax: axes of matplotlib; new ones by default.

    Returns:
      The axes, with contours of the sum of the losses, and no ticks.
    """
    import jax  # The losses are a traced function; everything else is NumPy.

    left, right, bottom, top = extent
    grid = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    points = np.stack([x.ravel() for x in grid], axis=1).astype(np.float32)
    total = np.asarray(jax.vmap(losses_fn)(points)).sum(axis=1).reshape(grid[0].shape)
    ax = _axes_for(ax, 3.2, 3.2)
    ax.contour(*grid, total, levels=25, cmap="Greys_r", linewidths=0.5)
    for path, colour in zip(np.asarray(paths), itertools.cycle(COLOURS)):
        ax.plot(*path.T, color=colour, linewidth=1.6)
        ax.plot(*path[0], "o", color=colour, markersize=5)
        ax.plot(*path[-1], "*", color="black", markersize=11, zorder=3)
    ax.set(xticks=[], yticks=[])
    return ax


def compare(result: Comparison, axes: Any = None) -> Any:
    """Draws a race: the trade-off, the learning rates, conflict over time.

    The first axes hold two metrics (or the only one) of every row at its chosen rate,
    with the static weightings that no other one beats in both joined by a line; the
    second the mean relative change against the plain sum at each rate; the third the
    cosine of the most opposed pair of gradients during training.

    Args:
      result: what :func:`optax_mtl.compare` returned.
      axes: three axes of matplotlib; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: for another number of axes.
    """
    if axes is None:
        from matplotlib import pyplot

        _, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    if len(axes) != 3:
        raise ValueError(f"compare draws on three axes, got {len(axes)}")
    scatter, sensitivity, over_time = axes
    chosen, best = result.chosen(), result.at_best()
    styles = {
        row: _style(number, result.methods[row])
        for number, row in enumerate(result.racers())
    }
    styles = {0: SUM} | styles

    if len(result.metrics) > 1:
        _two_metrics(result, scatter, styles)
    else:
        _one_metric(result, scatter, styles)

    baseline = best[0].mean(axis=0)
    signs = scores.signs_of(result.metrics, result.maximise)
    change = scores.relative_change(result.values, baseline, signs).mean(axis=2)
    for i, style in styles.items():
        sensitivity.plot(result.learning_rates, change[i], **style)
    sensitivity.axhline(0, linewidth=0.8, **GREY)
    sensitivity.set(
        xscale="log", xlabel="learning rate", ylabel="Δm %, lower is better"
    )
    rates = result.learning_rates
    sensitivity.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    sensitivity.minorticks_off()
    if np.max(np.abs(change), where=np.isfinite(change), initial=0) > 100:
        sensitivity.set_yscale("symlog", linthresh=10)

    num_points = result.min_cosines.shape[-1]
    steps = np.arange(num_points) / num_points  # Measured where a stretch begins.
    for i, style in styles.items():
        cosine = result.min_cosines[i, chosen[i]].mean(axis=0)
        over_time.plot(steps, cosine, markersize=3, **style)
    over_time.axhline(0, linewidth=0.8, **GREY)
    over_time.set(
        ylim=(-1.05, 1.05), xlabel="share of training", ylabel="smallest cosine"
    )
    return axes


def _two_metrics(result, axes, styles):
    """The first two metrics, and the static weightings."""
    rows, metrics = list(styles), [0, 1]
    trade_off(
        result.at_best()[rows][..., metrics],
        [style["label"] for style in styles.values()],
        result.metrics[:2],
        result.frontier()[:, metrics],
        scores.signs_of(result.metrics, result.maximise)[metrics],
        axes,
    )


def _one_metric(result, axes, styles):
    """A line for each row, in grey the static weightings on that of the sum."""
    best = result.at_best()[..., 0]
    static = result.frontier()[:, 0]
    axes.plot(static, 0 * static, "o", markersize=4, **GREY, label="static weightings")
    for line, (i, style) in enumerate(styles.items()):
        spread = best[i].std()
        axes.errorbar(best[i].mean(), -line, xerr=spread, capsize=2, **style)
    axes.set(xlabel=result.metrics[0])
    names = [style["label"] for style in styles.values()]
    axes.set_yticks(-np.arange(len(names)), names)
    _scale(axes, "x", best)


def _scale(axes, axis, found):
    """Logarithmic beyond a decade; within one its labels run into each other."""
    if found.min() > 0 and found.max() > 10 * found.min():
        axes.set(**{f"{axis}scale": "log"})


def _axes_for(ax, width, height):
    """The axes, or new ones of a size in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def _names_for(names, count):
    """Names, or numbers in their place."""
    if names is None:
        return list(map(str, range(count)))
    if len(names) != count:
        raise ValueError(f"there are {len(names)} names for {count} tasks")
    return list(names)


def _pairs(names):
    """The numbers of each two tasks, by their names."""
    numbers = itertools.combinations(range(len(names)), 2)
    return {f"{names[i]}, {names[j]}": (i, j) for i, j in numbers}


def _map_of_cosines(ax, table, numbers):
    image = ax.imshow(table, cmap=OPPOSED_TO_ALIGNED, vmin=-1, vmax=1, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="cosine", ticks=[-1, 0, 1])
    for (row, column), cosine in np.ndenumerate(table if numbers else np.empty((0, 0))):
        colour = "white" if abs(cosine) > 0.6 else "black"
        ax.text(
            column,
            row,
            f"{cosine:.2f}",
            color=colour,
            ha="center",
            va="center",
            fontsize="x-small",
        )


def _lines(ax, steps, table, labels):
    for i, (column, label) in enumerate(zip(table.T, labels)):
        style = _style(i, label) | {"markevery": max(1, len(steps) // 8)}
        ax.plot(steps, column, markersize=3, linewidth=1.2, **style)


def _style(number, label):
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "label": label}
