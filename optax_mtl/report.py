"""Conflicts in words, and in a table; states without their large arrays."""

from typing import Any

import jax
import numpy as np

_MAX_TABLE = 12  # Tasks; the cosines of more would be a wall of numbers.
_MAX_VALUES, _MAX_ARRAYS = 16, 8  # In a state: of more, shapes or numbers alone.


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


class _Text(str):
    """Text that is shown without quotes."""

    __repr__ = str.__str__


def describe_state(state: Any) -> str:
    """A state in one line: small arrays by value, others by dtype and shape.

    The ``__repr__`` of states that hold arrays as large as the parameters: whoever
    prints one should not meet all of their numbers.

    Args:
      state: a named tuple, with others inside it, of trees of arrays.
    """
    if isinstance(state, tuple):
        parts = list(map(describe_state, state))
        names = getattr(state, "_fields", None)
        if names is None:
            return f"({', '.join(parts)})"
        fields = [f"{name}={part}" for name, part in zip(names, parts)]
        return f"{type(state).__name__}({', '.join(fields)})"
    leaves = [x for x in jax.tree.leaves(state) if hasattr(x, "dtype")]
    if 0 < len(leaves) <= _MAX_ARRAYS:
        return repr(jax.tree.map(_describe_leaf, state))
    size = sum(x.size for x in leaves)
    dtypes = "".join(f", {dtype}" for dtype in sorted({str(x.dtype) for x in leaves}))
    return f"<{len(leaves)} arrays, {size:,} numbers{dtypes}>"


def _describe_leaf(x: Any) -> Any:
    if not hasattr(x, "dtype"):
        return x
    if x.size <= _MAX_VALUES and x.dtype.kind in "biuf" and _is_readable(x):
        text = np.array2string(np.asarray(x), precision=4, separator=", ")
        return _Text(" ".join(text.split()))
    return _Text(f"{x.dtype}[{','.join(map(str, x.shape))}]")


def _is_readable(x: Any) -> bool:
    """Whether there are values: not of shapes, nor of what is traced or was donated."""
    if isinstance(x, jax.core.Tracer):
        return False
    if isinstance(x, jax.Array):
        return x.is_fully_addressable and not x.is_deleted()
    return isinstance(x, (np.ndarray, np.generic))
