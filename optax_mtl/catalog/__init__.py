"""What each method is, reads and promises: one row a method, one table a family."""

from typing import Any

import optax

from optax_mtl.catalog import balance, baseline, conflict, loss, priority, robust
from optax_mtl.catalog.entry import Entry as Entry
from optax_mtl.catalog.entry import hint

_TABLES = (baseline, conflict, balance, loss, priority, robust)
METHODS: dict[str, Entry] = {
    name: row for table in _TABLES for name, row in table.ROWS.items()
}
FAMILIES = tuple(dict.fromkeys(row.family for row in METHODS.values()))


def get(
    name: str, num_tasks: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes a method by its name.

    Args:
      name: a key of :data:`METHODS`.
      num_tasks: number of tasks, T.
      **options: arguments of the method.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a name that is not in the catalog.
      TypeError: for an option that the method does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.get("pcgrad", num_tasks=2, key=3)
      >>> optax_mtl.get("pcgradd", num_tasks=2)
      Traceback (most recent call last):
      ...
      ValueError: there is no method 'pcgradd'; did you mean 'pcgrad'?
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"there is no method {name!r}; {hint(name, METHODS)}")
    return METHODS[name].make(num_tasks, **options)


def as_markdown(family: str | None = None) -> str:
    """The catalog, or the rows of a family, as the table of the documentation."""
    yes = lambda condition: "yes" if condition else ""
    columns = (
        "method",
        *(["family"] if family is None else []),
        "paper",
        "never conflicts",
        "scale-free",
        "needs losses",
        "one backward",
        "extra memory",
        "scale",
    )
    row = lambda cells: f"| {' | '.join(cells)} |"
    lines = [row(columns), "|" + "---|" * len(columns)]
    for name, entry in METHODS.items():
        if family not in (None, entry.family):
            continue
        _, venue, address = entry.paper
        cells = (
            f"`{name}`",
            *([entry.family] if family is None else []),
            f"[{venue}]({address})" if address else venue,
            yes("never_conflicts" in entry.promises),
            yes("scale_free" in entry.promises),
            yes("losses" in entry.reads),
            yes(not entry.reads & {"gram", "gradients"}),
            "" if entry.state in ("none", "tasks") else entry.state,
            entry.scale,
        )
        lines.append(row(cells))
    return "\n".join(lines)


def families_as_markdown() -> str:
    """The names of all methods, a line for each family, as in the README."""
    lines = []
    for family in FAMILIES:
        names = [f"`{name}`" for name, row in METHODS.items() if row.family == family]
        lines.append(f"| {family} | {', '.join(names)} |")
    return "\n".join(["| family | methods |", "|---|---|", *lines])
