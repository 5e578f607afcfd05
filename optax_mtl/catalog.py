"""What each method is, reads and promises: one row a method."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple

import optax

from optax_mtl.methods import cagrad, dwa, linear, pcgrad

Factory = Callable[..., optax.GradientTransformationExtraArgs]


class Entry(NamedTuple):
    """A row of :data:`METHODS`."""

    make: Factory  # From num_tasks and, by keyword, the options of the method.
    family: str  # "baseline", "conflict", "balance", "loss", "priority" or "robust".
    paper: tuple[str, str, str]  # Title, venue and year, address.
    reads: frozenset[str]  # What decides the update: gram, losses, gradients.
    scale: str  # For T equal gradients g: "sum" is T g, "mean" is g, or "own".
    state: str  # Size per parameter: "none", "tasks" (T x T at most), "P" or "T x P".
    promises: frozenset[str]  # Properties for any input; names of tests.


def _row(
    factory: Factory,
    family: str,
    paper: tuple[str, str, str],
    *,
    reads: str,
    scale: str,
    state: str = "none",
    promises: str = "",
    num_tasks: bool = False,
) -> Entry:
    """An entry; ``num_tasks`` says whether the factory takes the number of tasks."""
    make = factory if num_tasks else lambda num_tasks, **options: factory(**options)
    return Entry(
        make=make,
        family=family,
        paper=paper,
        reads=frozenset(reads.split()),
        scale=scale,
        state=state,
        promises=frozenset(promises.split()),
    )


_UNITARY = (
    "In Defense of the Unitary Scalarization for Deep Multi-Task Learning",
    "NeurIPS 2022",
    "https://arxiv.org/abs/2201.04122",
)

METHODS: dict[str, Entry] = {
    # Baselines: weights that depend on nothing.
    "linear": _row(
        linear.linear,
        "baseline",
        _UNITARY,
        reads="",
        scale="sum",
        promises="symmetric rotates scales linear_in_scales agrees ignores_absent",
    ),
    "mean": _row(
        linear.mean,
        "baseline",
        _UNITARY,
        reads="",
        scale="mean",
        promises="symmetric rotates scales linear_in_scales agrees",
    ),
    # Conflict: the directions of the gradients.
    "cagrad": _row(
        cagrad.cagrad,
        "conflict",
        (
            "Conflict-Averse Gradient Descent for Multi-task Learning",
            "NeurIPS 2021",
            "https://arxiv.org/abs/2110.14048",
        ),
        reads="gram",
        scale="own",
        promises="symmetric rotates scales agrees ignores_absent",
    ),
    "pcgrad": _row(
        pcgrad.pcgrad,
        "conflict",
        (
            "Gradient Surgery for Multi-Task Learning",
            "NeurIPS 2020",
            "https://arxiv.org/abs/2001.06782",
        ),
        reads="gram",
        scale="sum",
        state="tasks",
        promises="rotates scales linear_in_scales agrees",
    ),
    # Losses: weights from the losses alone, for the price of one backward pass.
    "dwa": _row(
        dwa.dwa,
        "loss",
        (
            "End-To-End Multi-Task Learning With Attention",
            "CVPR 2019",
            "https://arxiv.org/abs/1803.10704",
        ),
        reads="losses",
        scale="sum",
        state="tasks",
        promises="rotates scales linear_in_scales",
        num_tasks=True,
    ),
}


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

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.get("pcgrad", num_tasks=2, key=3)
      >>> optax_mtl.get("pcgradd", num_tasks=2)
      Traceback (most recent call last):
      ...
      ValueError: there is no method 'pcgradd'; did you mean 'pcgrad'?
    """
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        known = f"known are {', '.join(sorted(METHODS))}"
        hint = f"did you mean {close[0]!r}?" if close else known
        raise ValueError(f"there is no method {name!r}; {hint}")
    return METHODS[name].make(num_tasks, **options)


def as_markdown() -> str:
    """The catalog as the table in the README."""
    yes = lambda condition: "yes" if condition else ""
    head = (
        "| method | paper | reads | never conflicts | scale-free | scale | state |"
        " one backward |"
    )
    lines = [head, "|---" * 8 + "|"]
    for name, entry in METHODS.items():
        _, venue, address = entry.paper
        columns = [
            f"`{name}`",
            f"[{venue}]({address})" if address else venue,
            ", ".join(sorted(entry.reads)) or "nothing",
            yes("never_conflicts" in entry.promises),
            yes("scale_free" in entry.promises),
            entry.scale,
            entry.state,
            yes(not entry.reads & {"gram", "gradients"}),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)
