"""Figures, with matplotlib (the extra ``plots``)."""

from typing import Any

import numpy as np

from optax_mtl import scores
from optax_mtl.comparison import Comparison

# Okabe and Ito's colours, told apart by all eyes; then again with other markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"


def compare(result: Comparison, axes: Any = None) -> Any:
    """Draws a race: the trade-off, the learning rates, conflict over time.

    The first axes hold two metrics of every row at its chosen rate, with the static
    weightings that no other one beats in both joined by a line; the second the mean
    relative change against the plain sum at each rate; the third the cosine of the
    most opposed pair of gradients during training.

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
    styles[0] = {"color": "0.35", "marker": "s", "label": "sum"}

    metrics = [0, min(1, len(result.metrics) - 1)]
    means, spreads = best[..., metrics].mean(axis=1), best[..., metrics].std(axis=1)
    static = result.frontier()[:, metrics]
    signs = scores.signs_of(result.metrics, result.maximise)[metrics]
    beaten = (signs * static[None] < signs * static[:, None]).all(axis=2).any(axis=1)
    front = static[~beaten]
    front = front[np.argsort(front[:, 0])]
    grey = {"color": "0.7", "zorder": 1}
    trade_off.plot(*static.T, "o", markersize=4, **grey, label="static weightings")
    trade_off.plot(*front.T, "-", linewidth=1, **grey)
    for i, style in styles.items():
        trade_off.errorbar(
            *means[i], *spreads[i][::-1], capsize=2, linestyle="", **style
        )
    trade_off.set(xlabel=result.metrics[metrics[0]], ylabel=result.metrics[metrics[1]])
    for metric, axis in zip(metrics, "xy"):
        found = best[..., metric]
        # Within a decade the labels of a logarithmic axis run into each other.
        if found.min() > 0 and found.max() > 10 * found.min():
            trade_off.set(**{f"{axis}scale": "log"})

    baseline = best[0].mean(axis=0)
    signs = scores.signs_of(result.metrics, result.maximise)
    change = scores.relative_change(result.values, baseline, signs).mean(axis=2)
    for i, style in styles.items():
        sensitivity.plot(result.learning_rates, change[i], **style)
    sensitivity.axhline(0, linewidth=0.8, **grey)
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
    conflict.axhline(0, linewidth=0.8, **grey)
    conflict.set(
        ylim=(-1.05, 1.05), xlabel="share of training", ylabel="smallest cosine"
    )
    trade_off.legend(fontsize="x-small")
    return axes


def _style(number, label):
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "label": label}
