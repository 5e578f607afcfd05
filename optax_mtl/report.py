"""Conflicts in words, and in a table."""

from typing import Any

import numpy as np

_MAX_TABLE = 12  # Tasks; the cosines of more would be a wall of numbers.


def describe(report: Any) -> str:
    """What conflicts say: the share of pairs, the worst one, and a table of few tasks.

    Args:
      report: as :func:`optax_mtl.conflicts` returns it, of concrete arrays.
    """
    norms, cosines = np.asarray(report.norms), np.asarray(report.cosines)
    names = report.names or tuple(map(str, range(len(norms))))
    exists = norms != 0
    pairs = np.triu(np.outer(exists, exists), 1)
    lines = [
        f"{report.conflicting:.0%} of the pairs of {exists.sum()} tasks conflict;"
        f" alignment {report.alignment:.2f}"
    ]
    if np.any(~exists):
        absent = [name for name, there in zip(names, exists) if not there]
        lines.append(f"without a gradient: {', '.join(absent)}")
    if np.any(pairs):
        worst = np.argmin(np.where(pairs, cosines, np.inf))
        i, j = np.unravel_index(worst, pairs.shape)
        lines.append(
            f"most opposed: {names[i]} and {names[j]}, cosine {cosines[i, j]:.2f}"
        )
    if len(norms) > _MAX_TABLE:
        low, high = np.argmin(np.where(exists, norms, np.inf)), np.argmax(norms)
        lines.append(
            f"norms from {norms[low]:.3g} ({names[low]}) to {norms[high]:.3g}"
            f" ({names[high]})"
        )
        return "\n".join(lines)
    first = max(map(len, names))
    widths = [max(len(name), 5) for name in names]
    header = " ".join(f"{name:>{width}}" for name, width in zip(names, widths))
    lines.append(f"{'':{first}} {'norm':>9}  {header}")
    for name, norm, row in zip(names, norms, cosines):
        cells = " ".join(f"{c:>{width}.2f}" for c, width in zip(row, widths))
        lines.append(f"{name:{first}} {norm:>9.3g}  {cells}")
    return "\n".join(lines)
