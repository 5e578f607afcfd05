"""Figures, with matplotlib (the extra ``plots``)."""

from typing import Any

import numpy as np

from optax_mtl import scores
from optax_mtl.comparison import Comparison

# Okabe and Ito's colours, told apart by all eyes; then again with other markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"
GREY = {"color": "0.7", "zorder": 1}


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
    trade_off, sensitivity, conflict = axes
    chosen, best = result.chosen(), result.at_best()
    styles = {
        row: _style(number, result.methods[row])
        for number, row in enumerate(result.racers())
    }
    styles = {0: {"color": "0.35", "marker": "s", "label": "sum"}} | styles

    draw = _trade_off if len(result.metrics) > 1 else _one_metric
    draw(result, trade_off, styles)

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
        conflict.plot(steps, cosine, markersize=3, **style)
    conflict.axhline(0, linewidth=0.8, **GREY)
    conflict.set(
        ylim=(-1.05, 1.05), xlabel="share of training", ylabel="smallest cosine"
    )
    return axes


def _trade_off(result, axes, styles):
    """Two metrics, and the static weightings that no other one beats in both."""
    best, metrics = result.at_best(), [0, 1]
    means, spreads = best[..., metrics].mean(axis=1), best[..., metrics].std(axis=1)
    static = result.frontier()[:, metrics]
    signs = scores.signs_of(result.metrics, result.maximise)[metrics]
    beaten = (signs * static[None] < signs * static[:, None]).all(axis=2).any(axis=1)
    front = static[~beaten]
    front = front[np.argsort(front[:, 0])]
    axes.plot(*static.T, "o", markersize=4, **GREY, label="static weightings")
    axes.plot(*front.T, "-", linewidth=1, **GREY)
    for i, style in styles.items():
        axes.errorbar(*means[i], *spreads[i][::-1], capsize=2, linestyle="", **style)
    axes.set(xlabel=result.metrics[0], ylabel=result.metrics[1])
    for metric, axis in zip(metrics, "xy"):
        _scale(axes, axis, best[..., metric])
    axes.legend(fontsize="x-small")


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


def _style(number, label):
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "label": label}
