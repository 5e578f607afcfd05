"""What a row of the catalog says."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import optax

from optax_mtl import arguments, names

Factory = Callable[..., optax.GradientTransformationExtraArgs]


class Entry(NamedTuple):
    """A row of :data:`METHODS`."""

    make: Factory  # From num_tasks and, by keyword, the options of the method.
    family: str  # The folder of optax_mtl.methods that it stands in.
    paper: tuple[str, str, str]  # Title, venue and year, address.
    reads: frozenset[str]  # What decides the update: gram, losses, gradients.
    scale: str  # For T equal gradients g: "sum" is T g, "mean" is g, or "own".
    state: str  # Size per parameter: "none", "tasks" (T x T at most), "P" or "T x P".
    promises: frozenset[str]  # Properties for any input; names of tests.


def row(
    factory: Factory,
    paper: tuple[str, str, str],
    *,
    reads: str,
    scale: str,
    state: str = "none",
    promises: str = "",
) -> Entry:
    """An entry; the factory gets the number of tasks if it takes it."""
    known = list(inspect.signature(factory).parameters)

    def make(num_tasks: int, **options: Any) -> optax.GradientTransformationExtraArgs:
        arguments.check_count("num_tasks", num_tasks)
        for option in options:
            if option not in known:
                meant = hint(option, [name for name in known if name != "num_tasks"])
                raise TypeError(f"{factory.__name__} has no option {option!r}; {meant}")
        if "num_tasks" in known:
            options["num_tasks"] = num_tasks
        return factory(**options)

    return Entry(
        make=make,
        family=factory.__module__.split(".")[-2],
        paper=paper,
        reads=frozenset(reads.split()),
        scale=scale,
        state=state,
        promises=frozenset(promises.split()),
    )


def hint(name: Any, known: Collection[str]) -> str:
    """What the user may have meant."""
    near = names.nearest(name, known) if isinstance(name, str) else None
    if near:
        return f"did you mean {near!r}?"
    return f"known are {', '.join(sorted(known)) or 'none'}"
