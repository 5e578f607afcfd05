"""Task gradients and resolved gradients of Flax NNX models, in one call."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optax_mtl.gradients import resolved, stacked
from optax_mtl.gradients.backward import take_aux
from optax_mtl.gradients.resolver import Resolver
from optax_mtl.labels import Labels

_CONTEXT = "optax_mtl"


def value_and_task_grads(
    losses_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    shared: Labels | nnx.filterlib.Filter | None = None,
    own_data: bool = False,
) -> Callable[..., tuple[Any, nnx.State]]:
    r"""Makes a function that returns the losses and the gradient of each task.

    .. math::

      g_i = \nabla_\theta L_i(\theta), \quad i = 1, \ldots, T

    As :func:`optax_mtl.value_and_task_grads`, for a model in the place of the
    parameters; as ``nnx.value_and_grad``, what one forward pass changes in the model
    and in the further arguments is written back: batch statistics, counts of random
    numbers, ``rngs``.

    Args:
      losses_fn: maps the model and further arguments, such as a batch and ``rngs``,
        to the losses: a vector of shape ``(T,)`` or a dict of named scalars (tasks in
        the order of the sorted names).
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      wrt: filter of the variables to differentiate with respect to, that of the
        ``nnx.Optimizer``.
      shared: which of them all tasks share: a filter, such as
        ``nnx.PathContains("trunk")``; a function of the path of a parameter, such as
        ``lambda path: "trunk" in path``; or a tree of bools, as a dict or
        ``nnx.State``. The others (heads) get the ordinary gradient of the sum of the
        losses, not stacked. ``None``: all.
      own_data: whether each task has data of its own, as in
        :func:`optax_mtl.value_and_task_grads`: ``losses_fn`` returns the loss of one
        task, and the positional arguments after the model are arrays with a leading
        task axis; what is the same for all, such as ``rngs``, goes by keyword. Of
        what the tasks change in the model, floating-point numbers such as batch
        statistics are averaged over the tasks, and anything else, such as counts of
        random numbers, is that of the first.

    Returns:
      A function of the model and further arguments that returns
      ``(losses, grads)``, or ``((losses, aux), grads)``; ``grads`` is an ``nnx.State``
      as ``nnx.grad`` returns, each of its variables with one leading task axis, those
      of heads excepted.

    Raises:
      TypeError: at the call, if the first argument is no module, and for variables
        that are not floating point.
      ValueError: at the call, for a model without variables of the filter, and if the
        losses are neither a vector nor scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> losses_fn = lambda model, x: model(x).mean(axis=0)  # One for each output.
      >>> x = jnp.array([[1.0, 3.0]])
      >>> losses, grads = optax_mtl.nnx.value_and_task_grads(losses_fn)(model, x)
      >>> print(grads["bias"][...])
      [[1. 0.]
       [0. 1.]]
    """

    def task_grads(pure_fn, params, mask, data):
        fn = stacked.value_and_task_grads(
            pure_fn, has_aux=True, shared=mask, own_data=own_data
        )
        value, updates = fn(nnx.as_pure(params), *data)
        return value, (_like(params, updates),)

    def fn(model, *args, **kwargs):
        value, (grads,) = _differentiate(
            task_grads, losses_fn, has_aux, wrt, shared, own_data, model, args, kwargs
        )
        return value, grads

    return fn


def value_and_grad(
    losses_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    shared: Labels | nnx.filterlib.Filter | None = None,
    mode: str = "auto",
    measure: Labels | nnx.filterlib.Filter | None = None,
    own_data: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> Resolver:
    r"""Makes a function that returns the losses and the resolved gradient.

    As :func:`optax_mtl.value_and_grad`, for a model in the place of the parameters;
    as ``nnx.value_and_grad``, what one forward pass changes in the model and in the
    further arguments is written back.

    Args:
      losses_fn: as in :func:`value_and_task_grads`.
      method: as in :func:`optax_mtl.value_and_grad`.
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      wrt: as in :func:`value_and_task_grads`.
      shared: which parameters the method resolves, as there; the others get the
        gradient of the sum.
      mode: ``"auto"``, ``"gram"``, ``"leafwise"`` or ``"stacked"``, as in
        :func:`optax_mtl.value_and_grad`.
      measure: of which of the shared parameters the method sees the inner products, in
        the forms of ``shared``, as in :func:`optax_mtl.value_and_grad`; for example
        ``nnx.PathContains("last")``. ``None``: all.
      own_data: whether each task has data of its own, as in
        :func:`value_and_task_grads`.
      optimizer: makes updates of all parameters out of the gradient, as there. One
        state then holds what the method and what the optimizer keep, and there is no
        ``nnx.Optimizer``: write ``optax_mtl.apply_updates(nnx.state(model, wrt),
        updates)`` to the model by ``nnx.update``.

    Returns:
      A function of the model, the state and further arguments that returns
      ``(losses, grads, state)``, or ``((losses, aux), grads, state)``; ``grads`` is an
      ``nnx.State`` as ``nnx.grad`` returns. Its ``init`` makes the first state from
      the model.

    Raises:
      TypeError: at the call, as :func:`value_and_task_grads`, and for a method that
        reads the gradients themselves in a mode that does not hold them.
      ValueError: for an unknown mode; at the call, as :func:`value_and_task_grads`,
        and for a state or a result of other shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> losses_fn = lambda model, x: model(x).mean(axis=0)
      >>> resolve = optax_mtl.nnx.value_and_grad(losses_fn, optax_mtl.mgda())
      >>> state = resolve.init(model)
      >>> losses, grads, state = resolve(model, state, jnp.array([[1.0, 3.0]]))
      >>> print(grads["bias"][...])
      [0.5 0.5]
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
      >>> _ = optimizer.update(model, grads)

      Two tasks with an example each, and one loss for both:

      >>> loss_fn = lambda model, x: model(x).sum()
      >>> resolve = optax_mtl.nnx.value_and_grad(
      ...     loss_fn, optax_mtl.mgda(), own_data=True, measure=nnx.PathContains("bias")
      ... )
      >>> losses, grads, state = resolve(model, resolve.init(model), jnp.eye(2))
      >>> print(losses.shape, grads["bias"][...])
      (2,) [1. 1.]
    """

    def resolver(pure_fn, mask, measured):
        return resolved.value_and_grad(
            pure_fn,
            method,
            True,
            mode=mode,
            shared=mask,
            measure=measured,
            own_data=own_data,
            optimizer=optimizer,
        )

    resolver(losses_fn, None, None)  # Validates the mode.

    def init(model):
        params = _params_of(model, nnx.state(model, wrt), wrt)
        mask = mask_of_state(params, shared)
        return resolver(losses_fn, mask, None).init(nnx.as_pure(params))

    def fn(model, state, *args, **kwargs):
        def resolved_grads(pure_fn, params, mask, data):
            resolve = resolver(pure_fn, mask, mask_of_state(params, measure))
            value, grads, new_state = resolve(nnx.as_pure(params), state, *data)
            return value, (_like(params, grads), new_state)

        value, (grads, new_state) = _differentiate(
            resolved_grads,
            losses_fn,
            has_aux,
            wrt,
            shared,
            own_data,
            model,
            args,
            kwargs,
        )
        return value, grads, new_state

    return Resolver(init, fn)


@nnx.update_context(_CONTEXT)
def _differentiate(
    grads_of, losses_fn, has_aux, wrt, shared, own_data, model, args, kwargs
):
    """What ``grads_of`` makes of the losses as a function of parameters and own data.

    The state of the model and of the arguments passes through, and is written back.
    """
    _check_module(model)
    # What has a task axis is no part of what passes through.
    args, data = ((), args) if own_data else (args, ())
    changed: list[bool] = []
    of_model = nnx.filterlib.to_predicate(wrt)
    is_param = lambda path, variable: path[0] == 0 and of_model(path[1:], variable)
    with nnx.split_context(_CONTEXT) as outside:
        graphdef, inputs, rest = outside.split((model, args, kwargs), is_param, ...)
    params = _params_of(model, inputs[0] if 0 in inputs else nnx.State({}), wrt)

    def pure_fn(values, *data):
        with nnx.merge_context(_CONTEXT, inner=True) as inside:
            inputs: nnx.State = nnx.State({0: _like(params, values)})
            model, args, kwargs = inside.merge(graphdef, inputs, rest)
        try:
            value = losses_fn(model, *args, *data, **kwargs)
        except Exception as error:
            _explain_split_rngs(error, rest)
            raise
        losses, aux = take_aux(value, has_aux)
        with nnx.split_context(_CONTEXT) as inside:
            passed_through = inside.split(((model, args, kwargs), aux))
        kept = {id(x) for x in jax.tree.leaves((values, rest))}
        changed[:] = [id(x) not in kept for x in jax.tree.leaves(passed_through)]
        return losses, passed_through

    (losses, passed_through), grads = grads_of(
        pure_fn, params, mask_of_state(params, shared), data
    )
    if own_data:
        definition, state = passed_through
        passed_through = definition, _of_all_tasks(state, changed)
    with nnx.merge_context(_CONTEXT, inner=False) as outside:
        _, aux = outside.merge(*passed_through)
    return ((losses, aux) if has_aux else losses), grads


def _of_all_tasks(state: nnx.State, changed: list[bool]) -> nnx.State:
    """One state of the model for all tasks; auxiliary data, its second part, stay."""

    def unite(path, x, is_changed):
        if path[0].key == 1:
            return x
        is_averaged = is_changed and jnp.issubdtype(x.dtype, jnp.inexact)
        return x.mean(axis=0) if is_averaged else x[0]

    marks = jax.tree.unflatten(jax.tree.structure(state), changed)
    return jax.tree_util.tree_map_with_path(unite, state, marks)


def _check_module(model: Any) -> None:
    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            f"the first argument is a {type(model).__name__}, expected the model, an"
            " nnx.Module: hand several models over as one nnx.List or nnx.Dict, a split"
            " one as nnx.merge(graphdef, state)"
        )


def _params_of(model: Any, params: nnx.State, wrt: nnx.filterlib.Filter) -> nnx.State:
    """The parameters that a filter picked, of which there must be some."""
    _check_module(model)
    if not jax.tree.leaves(params):
        state = nnx.to_flat_state(nnx.state(model))
        found = sorted({type(variable).__name__ for _, variable in state})
        raise ValueError(
            f"wrt={wrt} picks no variable of this {type(model).__name__}, whose"
            f" variables are {', '.join(found) or 'none'}"
        )
    return params


def _like(params: nnx.State, values: Any) -> nnx.State:
    """The values as a state of variables."""
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(values))


def mask_of_state(params: nnx.State, shared: Any) -> Any:
    """A filter or a tree as bools for a state of parameters; functions as they are.

    A filter that is a function takes the path and the variable, a label the path.
    """
    if isinstance(shared, nnx.State):
        return nnx.as_pure(shared)
    if isinstance(shared, dict):
        return nnx.State(shared)
    is_filter = isinstance(shared, (type, str, tuple, list)) or shared is ...
    if is_filter or (callable(shared) and _num_arguments(shared) == 2):
        return nnx.map_state(nnx.filterlib.to_predicate(shared), params)
    return shared


def _num_arguments(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    required = (p for p in parameters if p.default is p.empty)
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)


def _explain_split_rngs(error: Exception, rest: nnx.State) -> None:
    for path, variable in nnx.to_flat_state(rest):
        if isinstance(variable, nnx.RngKey) and variable.ndim:
            node, *names = path
            where = {"0": "model", "1": "args", "2": "kwargs"}[str(node)]
            where += "".join(f"[{name!r}]" for name in names)
            error.add_note(
                f"The random key {where} is split, shape {variable.shape}, perhaps by"
                " nnx.split_rngs over tasks. One forward pass serves all tasks: hand"
                " rngs over unsplit, unless the model splits them itself."
            )
            return
