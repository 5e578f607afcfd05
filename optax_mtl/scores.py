"""Scores over several metrics, as the field reports them."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def delta_m(
    metrics: Mapping[str, Any],
    baseline: Mapping[str, Any],
    maximise: Collection[str] = (),
) -> float:
    r"""Mean relative change against a baseline, in percent; positive is worse.

    .. math::

      \Delta m = \frac{100}{K} \sum_k s_k \frac{m_k - b_k}{|b_k|},

    where :math:`s_k` is -1 for a metric that is to be maximised and 1 otherwise: the
    sign of recent papers, the opposite of the first one's.

    Args:
      metrics: values by name.
      baseline: values of the same names, such as those of single-task models.
      maximise: names of the metrics of which more is better.

    Returns:
      The change in percent. Infinite or NaN where a baseline is zero.

    Raises:
      ValueError: for names that differ or do not exist.

    Examples:
      >>> import optax_mtl
      >>> baseline = {"accuracy": 0.8, "error": 2.0}
      >>> result = {"accuracy": 0.82, "error": 2.2}
      >>> print(f"{optax_mtl.delta_m(result, baseline, maximise=['accuracy']):.2f}")
      3.75

    References:
      Maninis et al, `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, CVPR 2019.
    """
    if set(metrics) != set(baseline):
        raise ValueError(
            f"metrics has {sorted(metrics)}, but baseline {sorted(baseline)}; hand over"
            " the same names"
        )
    signs = signs_of(metrics, maximise)
    table = lambda values: np.array([float(values[k]) for k in metrics])
    return float(relative_change(table(metrics), table(baseline), signs))


def relative_change(values, baseline, signs):
    """Delta-m of arrays whose last axis holds the metrics."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.mean(signs * (values - baseline) / np.abs(baseline), axis=-1)


def signs_of(metrics: Collection[str], maximise: Collection[str]) -> np.ndarray:
    """-1 for the metrics to maximise, 1 for the others; of each in its order."""
    maximise = [maximise] if isinstance(maximise, str) else maximise
    for name in maximise:
        if name not in metrics:
            raise ValueError(
                f"maximise names {name!r}, but the metrics are {', '.join(metrics)}"
            )
    return np.array([-1 if name in maximise else 1 for name in metrics])


def mean_rank(
    results: Mapping[str, Mapping[str, Any]], maximise: Collection[str] = ()
) -> dict[str, float]:
    """Ranks of the methods, averaged over the metrics; 1 is best.

    Methods that are equal share the mean of their ranks; what is not a number comes
    last.

    Args:
      results: for each method, its metrics by name.
      maximise: names of the metrics of which more is better.

    Returns:
      The mean rank of each method.

    Raises:
      ValueError: for metrics that differ or do not exist.

    Examples:
      >>> import optax_mtl
      >>> results = {"sum": {"a": 1.0, "b": 3.0}, "mgda": {"a": 1.0, "b": 2.0}}
      >>> optax_mtl.mean_rank(results)
      {'sum': 1.75, 'mgda': 1.25}

    References:
      Navon et al, `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022, for its use.
    """
    known = list(next(iter(results.values()), {}))
    for method, metrics in results.items():
        if set(metrics) != set(known):
            raise ValueError(
                f"{method} has the metrics {sorted(metrics)}, others {sorted(known)}"
            )
    rows = [[float(metrics[k]) for k in known] for metrics in results.values()]
    table = np.reshape(rows, (len(results), len(known)))
    ranks = ranks_of(signs_of(known, maximise) * table)
    return {method: float(rank) for method, rank in zip(results, ranks)}


def ranks_of(table: np.ndarray) -> np.ndarray:
    """Mean rank of each row over the columns, the smallest first."""
    table = np.where(np.isnan(table), np.inf, table)
    below = (table[None] < table[:, None]).sum(axis=1)
    equal = (table[None] == table[:, None]).sum(axis=1)
    return (below + (equal + 1) / 2).mean(axis=1)


def hypervolume(points: Any, reference: Sequence[float]) -> float:
    """Area or volume that a set of points dominates, up to a reference; exact.

    Args:
      points: values to minimise, of shape (N, K), for K = 1, 2 or 3 metrics.
      reference: the worst value that counts, of each metric. Points beyond it add
        nothing.

    Returns:
      The volume of all that is worse than some point and better than the reference.

    Raises:
      ValueError: for other shapes.

    Examples:
      >>> import optax_mtl
      >>> optax_mtl.hypervolume([[1.0, 3.0], [2.0, 1.0]], reference=[4.0, 4.0])
      7.0

    References:
      Zitzler and Thiele, `Multiobjective evolutionary algorithms
      <https://doi.org/10.1109/4235.797969>`_, IEEE Transactions on Evolutionary
      Computation 1999.
    """
    table, worst = np.asarray(points, float), np.asarray(reference, float)
    if table.ndim != 2 or worst.shape != table.shape[1:] or not 0 < len(worst) < 4:
        raise ValueError(
            f"points have shape {table.shape} and the reference {worst.shape}; they"
            " should be (N, K) and (K,), with one to three metrics"
        )
    table = table[np.all(table < worst, axis=1)]
    return _volume(table, worst)


def _volume(points, worst):
    """Slices along the last metric, each as wide as the next point is far."""
    if not len(points):
        return 0.0
    if len(worst) == 1:
        return float(worst[0] - points.min())
    points = points[np.argsort(points[:, -1])]
    ends = np.append(points[1:, -1], worst[-1])
    return math.fsum(
        (end - point[-1]) * _volume(points[: i + 1, :-1], worst[:-1])
        for i, (point, end) in enumerate(zip(points, ends))
        if end > point[-1]
    )
