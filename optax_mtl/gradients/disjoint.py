"""Whether each task reads data of its own, where nobody said ``own_data=True``.

Found in the program of the losses, by what each array in it depends on. What is not
understood counts as dependent on everything, so that there is no false alarm.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from optax_mtl.gradients.backward import take_aux

_FEW = 8  # Tasks whose passes over the data of all are not worth a word.
_ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp convert_element_type copy cos div eq erf exp exp2"
    " expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne"
    " neg not or pow rsqrt select_n sign sin sqrt square stop_gradient sub tanh".split()
)
_REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod"
    " reduce_sum".split()
)
# Without data it serves all tasks, as that on points which losses_fn makes itself.
_WORK = frozenset("conv_general_dilated dot_general scan threefry2x32 while".split())
_CLOSED_OVER = "closed over"  # Whatever losses_fn does not get as an argument.
_CALLS = frozenset(
    "checkpoint closed_call custom_jvp_call custom_vjp_call jit pjit remat2".split()
)


class _Seen(NamedTuple):
    """What an array depends on."""

    sources: frozenset = frozenset()  # Pairs of an argument and a row, None for all.
    axis: int | None = None  # Along which its k-th part depends on their k-th rows.
    form: int = 0  # Equal for equal computations on equal shapes.


def warn_of_own_data(
    losses_fn: Callable[..., Any],
    has_aux: bool,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_tasks: int,
) -> None:
    """Warns if many losses share no data and are computed alike."""
    if num_tasks <= _FEW:
        return

    def leaves_of(params, args):
        losses, _ = take_aux(losses_fn(params, *args, **kwargs), has_aux)
        return jax.tree.leaves(losses)

    jaxpr = jax.make_jaxpr(leaves_of)(params, args).jaxpr
    count = len(jax.tree.leaves(params))
    inputs = {x: _Seen(form=_form(x)) for x in jaxpr.invars[:count]}
    for name, x in enumerate(jaxpr.invars[count:]):
        inputs[x] = _data(x, name, num_tasks)
    outputs = _follow(jaxpr, inputs, num_tasks)
    rows = outputs[0] if len(outputs) == 1 else outputs
    if _are_disjoint(rows, num_tasks):
        warnings.warn(
            f"the losses of {num_tasks} tasks share no data, but each of as many"
            " backward passes goes over the data of all. With own_data=True one pass"
            " serves them: losses_fn then returns the loss of one task, and the data"
            " lie along the leading axis of its arguments",
            stacklevel=3,
        )


def _form(x):
    return hash(x.aval.shape)


def _data(x, name, num_tasks=None):
    form = _form(x)
    if not x.aval.shape:  # One number for all.
        return _Seen(form=form)
    axis = 0 if x.aval.shape[0] == num_tasks else None
    return _Seen(frozenset([(name, None)]), axis, form)


def _are_disjoint(rows, num_tasks):
    if isinstance(rows, _Seen):
        return rows.axis == 0 and bool(rows.sources)
    if len(rows) != num_tasks or len({row.form for row in rows}) > 1:
        return False
    sources = [source for row in rows for source in row.sources]
    whole = {name for name, k in sources if k is None}
    split = {name for name, k in sources if k is not None}
    apart = len(set(sources)) == len(sources) and not whole & split
    return apart and all(row.sources and row.axis is None for row in rows)


def _follow(jaxpr, env, num_tasks):
    """What the results depend on; a list for one that stacks a number for each task."""

    def read(x):
        constant = _data(x, _CLOSED_OVER)
        return constant if isinstance(x, Literal) else env.get(x, constant)

    for eqn in jaxpr.eqns:
        values = [read(x) for x in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        called = eqn.primitive.name in _CALLS and inner is not None
        if called and len(inner.invars) == len(values):
            found = _follow(inner, dict(zip(inner.invars, values)), num_tasks)
        else:
            found = [_result(eqn, values, out.aval, num_tasks) for out in eqn.outvars]
        env.update(zip(eqn.outvars, found))
    return [read(x) for x in jaxpr.outvars]


def _result(eqn, values, aval, num_tasks):
    name, shape = eqn.primitive.name, aval.shape
    stacks = name in ("concatenate", "stack") and shape == (num_tasks,)
    if stacks and len(values) == num_tasks:
        return values
    if name in _ELEMENTWISE and len(values) == 1 and isinstance(values[0], list):
        return values[0]
    flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
    form = hash((name, shape, *(x.form for x in flat)))
    sources = frozenset().union(*(x.sources for x in flat))
    known = [x for x in flat if x.sources]
    if not known and (name in _WORK or name.startswith("random")):
        sources = frozenset([(_CLOSED_OVER, None)])
    if len(flat) > len(values) or all(x.axis is None for x in known):
        return _Seen(sources, None, form)
    axis = _axis_of(eqn, values, aval)
    if axis is not None:
        return _Seen(sources, axis, form)
    row = None
    if name == "slice" and shape[values[0].axis] == 1:
        row = eqn.params["start_indices"][values[0].axis]
    return _Seen(frozenset((argument, row) for argument, _ in sources), None, form)


def _axis_of(eqn, values, aval):
    """Where the axis of the tasks goes; ``None`` where their rows may meet."""
    name, params = eqn.primitive.name, eqn.params
    axes = {x.axis for x in values if x.sources}
    if None in axes or (len(axes) > 1 and name != "dot_general"):
        return None
    (axis, *_) = axes
    if name in _ELEMENTWISE:
        return axis
    if name in _REDUCTIONS:
        gone = params["axes"]
        return None if axis in gone else axis - sum(a < axis for a in gone)
    if name == "squeeze":
        gone = params["dimensions"]
        return None if axis in gone else axis - sum(a < axis for a in gone)
    if name == "concatenate":
        return None if params["dimension"] == axis else axis
    if name == "slice":
        return axis if aval.shape[axis] == eqn.invars[0].aval.shape[axis] else None
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name in ("reshape", "expand_dims"):
        before = eqn.invars[0].aval.shape
        return 0 if axis == 0 and aval.shape[:1] == before[:1] else None
    if name == "gather" and not values[0].sources and axis == 0:
        offsets = params["dimension_numbers"].offset_dims
        return min(set(range(len(aval.shape))) - set(offsets), default=None)
    if name == "dot_general":
        return _axis_of_product(eqn, values)
    return None


def _axis_of_product(eqn, values):
    contracted, batched = eqn.params["dimension_numbers"]
    places: list[int | None] = []
    for side, value in enumerate(values):
        if not value.sources:
            places.append(None)
            continue
        if value.axis in contracted[side]:
            return None
        if value.axis in batched[side]:
            places.append(batched[side].index(value.axis))
            continue
        other = set(contracted[side]) | set(batched[side])
        free = [a for a in range(eqn.invars[side].aval.ndim) if a not in other]
        offset = len(batched[0]) + free.index(value.axis)
        if side == 1:
            taken = len(contracted[0]) + len(batched[0])
            offset += eqn.invars[0].aval.ndim - taken
        places.append(offset)
    found = {place for place in places if place is not None}
    return found.pop() if len(found) == 1 else None
