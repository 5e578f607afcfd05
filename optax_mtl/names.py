"""Options by the names of the tasks, which come with the losses."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

import jax
import optax

from optax_mtl import tasks

# One number for all tasks, an array of one for each, or a dict of one for each name.
PerTask = jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike]
Task = int | str  # The number of a task, or its name.

P = ParamSpec("P")
R = TypeVar("R")


def by_name(
    *per_task: str,
    of_tasks: Collection[str] = (),
    at_first: Collection[str] = (),
    some_only: Collection[str] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes options of a factory take the names of the tasks for their numbers.

    The names are known where the losses are: at each update, at trace time. There the
    factory is called again, with numbers. What decides the initial state, before there
    are losses, is numbered in the order of the sorted names, which is that of the
    losses in a dict; losses in another order are refused then.

    Args:
      *per_task: options with one value for each task, which may be a dict from the
        names to the values.
      of_tasks: options that number a task, or all of them in an order, and which may
        name them.
      at_first: those with one value for each task that decide the initial state.
      some_only: those of ``per_task`` that may leave tasks out: these have ``None``.

    Returns:
      A decorator of the factory of a gradient transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.linear(weights={"main": 1.0, "aux": 0.5})
      >>> losses = {"main": jnp.array(3.0), "aux": jnp.array(4.0)}
      >>> print(method.update(jnp.eye(2), method.init(None), losses=losses)[0])
      [0.5 1. ]
    """

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        parameters = list(inspect.signature(factory).parameters)

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = dict(zip(parameters, args)) | kwargs
            named = {
                option: value
                for option, value in given.items()
                if (option in (*per_task, *at_first) and isinstance(value, Mapping))
                or (option in of_tasks and _holds_names(value))
            }
            if not named:
                return factory(*args, **kwargs)
            return _resolved_later(factory, given, named, at_first, some_only)

        return make

    return decorate


def _holds_names(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and any(isinstance(x, str) for x in value)


def _resolved_later(
    factory: Callable[..., optax.GradientTransformationExtraArgs],
    given: dict[str, Any],
    named: dict[str, Any],
    at_first: Collection[str],
    some_only: Collection[str],
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a factory whose options are numbered at each update."""

    # Checks the values, and has the right initial state.
    in_order = {
        option: _numbered(option, value, sorted(_names_in(value), key=str))
        for option, value in named.items()
    }
    init = factory(**(given | in_order)).init

    def update(updates, state, params=None, *, losses=None, **extra_args):
        count = tasks.check_stacked(updates, params, gram_suffices=True)
        if count is None:
            return updates, state
        known = tasks.names_of(losses)
        if known is None:
            option, value = next(iter(named.items()))
            scalars = ", ".join(f"{name!r}: ..." for name in _names_in(value))
            raise TypeError(
                f"{option} is {value!r}, but the losses have no names: hand them on as"
                f" a dict of scalars, losses={{{scalars}}}, or return one from"
                " losses_fn; or give the tasks by number"
            )
        if len(known) != count:
            raise ValueError(
                f"there are losses of {len(known)} tasks, {', '.join(known)}, but"
                f" gradients of {count}"
            )
        numbered = {
            option: _numbered(option, value, known, option in some_only)
            for option, value in named.items()
        }
        for option in numbered:
            if option in at_first and known != sorted(known):
                raise ValueError(
                    f"{option} by name counts on losses in the order of their sorted"
                    " names, as in a dict, since the state is made before they are"
                    f" known; but these come as {', '.join(map(repr, known))}: give one"
                    " number for each in that order"
                )
        return factory(**(given | numbered)).update(
            updates, state, params, losses=losses, **extra_args
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _names_in(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _numbered(
    option: str, value: Any, known: Sequence[str], some_only: bool = False
) -> Any:
    """A dict as the list of its values, a name as its number, names as a list."""
    if len(set(_names_in(value))) < len(_names_in(value)):
        raise ValueError(f"{option} is {value!r}; it should name each task once")
    for name in _names_in(value):
        if name not in known:
            near = nearest(name, known) if isinstance(name, str) else None
            raise ValueError(
                f"{option} names the task {name!r}, but the tasks are"
                f" {', '.join(map(repr, known))}"
                + (f"; did you mean {near!r}?" if near else "")
            )
    if isinstance(value, str):
        return known.index(value)
    missing = [name for name in known if name not in value]
    if missing and not some_only:
        raise ValueError(
            f"{option} leaves out {', '.join(map(repr, missing))}; it should name each"
            f" of the tasks {', '.join(map(repr, known))}"
        )
    if isinstance(value, Mapping):
        return [value.get(name) for name in known]
    return [known.index(name) for name in value]


def group_losses(
    losses: Mapping[str, jax.Array], groups: Mapping[str, Sequence[str]]
) -> dict[str, jax.Array]:
    r"""Sums several losses into each task, at the end of ``losses_fn``.

    .. math::

      L_k = \sum_{j \in S_k} l_j

    One backward pass, and one gradient to resolve, for each task and not for each loss:
    losses that pull together, such as those of the boxes and the classes of a detector,
    need no method between them.

    Args:
      losses: by name, scalars.
      groups: for each task, the names of its losses. Each loss belongs to one task.

    Returns:
      The losses of the tasks, by name.

    Raises:
      TypeError: for losses without names.
      ValueError: for a loss in no task or in two, and for one that does not exist.

    Examples:
      >>> import optax_mtl
      >>> losses = {"boxes": 1.0, "classes": 2.0, "depth": 0.5}
      >>> groups = {"detection": ["boxes", "classes"], "depth": ["depth"]}
      >>> print(optax_mtl.group_losses(losses, groups))
      {'detection': 3.0, 'depth': 0.5}
    """
    for name, value in {"losses": losses, "groups": groups}.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is {value!r}, expected a dict")
    for task, members in groups.items():
        is_list = isinstance(members, Collection) and not isinstance(members, str)
        if not is_list or not members:
            raise ValueError(
                f"groups has {members!r} for the task {task!r}, expected a list of"
                " names of losses, one at least"
            )
    grouped = [name for members in groups.values() for name in members]
    grouped, known = sorted(grouped, key=str), sorted(losses, key=str)
    if grouped != known:
        raise ValueError(
            f"groups holds {', '.join(map(repr, grouped))}, but the losses are"
            f" {', '.join(map(repr, known))}; each belongs to one task"
        )
    totals = {}
    for task, (first, *others) in groups.items():
        totals[task] = losses[first]
        for name in others:
            totals[task] += losses[name]
    return totals


def nearest(name: str, known: Collection[str]) -> str | None:
    """What the user may have meant, if any is close."""
    plain = lambda text: text.lower().replace("_", "").replace("-", "")
    by_plain_name = {plain(text): text for text in known}
    close = get_close_matches(plain(name), by_plain_name, n=1)
    return by_plain_name[close[0]] if close else None
