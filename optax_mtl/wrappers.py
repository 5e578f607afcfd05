"""Transformations around a method."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, base, names, tasks
from optax_mtl.labels import Labels, labels_of, mask_of


@names.by_name("weights", some_only=["weights"])
def fix_weights(
    method: optax.GradientTransformationExtraArgs,
    weights: Sequence[jax.typing.ArrayLike | None] | Mapping[str, jax.typing.ArrayLike],
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps some tasks out of a method, with weights that the user gives.

    .. math::

      d = \operatorname{method}(g_i, i \notin F) + \sum_{i \in F} c_i g_i

    Such as a regulariser, or a small auxiliary loss, whose weight is known to be right.

    Args:
      method: any method, for all T tasks; those of fixed weight are absent to it.
      weights: :math:`c`, by the names of the tasks that it fixes, or one entry a task
        with ``None`` for those that the method resolves. 0 leaves a task out.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.fix_weights(optax_mtl.mgda(), {"kl": 0.1})
      >>> losses = {"depth": 3.0, "kl": 20.0, "labels": 0.5}
      >>> updates = jnp.array([[1.0, 0], [5, 5], [0, 1]])
      >>> print(method.update(updates, method.init(None), losses=losses)[0])
      [1. 1.]

    .. note::
      The weights are on the scale of the method: where it returns a mean, 1 counts as
      much as all of its tasks together.
    """
    method = arguments.as_transformation("method", method)
    if not hasattr(weights, "__len__"):
        raise TypeError(
            f"weights are {weights!r}, expected a dict from the names of tasks to their"
            " weights, or a list of one entry for each task"
        )
    is_fixed = [weight is not None for weight in weights]
    if not any(is_fixed):
        raise ValueError("weights fix none of the tasks: take the method without them")
    constant = [0 if weight is None else weight for weight in weights]
    for weight in constant:
        arguments.check_range("weights", weight, "(-inf, inf)")
        if np.ndim(weight):
            raise ValueError(f"weights hold {weight!r}, expected one number for a task")

    def update(updates, state, params=None, *, losses=None, **extra_args):
        count = tasks.check_stacked(updates, params, gram_suffices=True)
        if count is None:
            return updates, state
        if count != len(is_fixed):
            raise ValueError(
                f"weights have {len(is_fixed)} entries, expected one for each of the"
                f" {count} tasks: None for those that the method resolves"
            )
        fixed = jnp.array(is_fixed)
        if losses is not None:
            vector = tasks.stack_losses(losses, count)
            losses = tasks.unstack_losses(jnp.where(fixed, 0, vector), losses)
        extra_args["losses"] = losses
        values = jnp.stack([jnp.asarray(x, float) for x in constant])
        is_view = isinstance(updates, tasks.GramView)
        view = _beside(updates if is_view else _view(count, updates), fixed, values)
        try:  # One pass to measure and one to combine, if that is enough.
            return method.update(view, state, params, **extra_args)
        except tasks.NeedsTaskGrads:
            if is_view:
                raise
        rest = tasks.drop_tasks(~fixed, updates)
        out, new_state = method.update(rest, state, params, **extra_args)
        out = jax.tree.map(jnp.add, out, tasks.combine(values, updates))
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return optax.GradientTransformationExtraArgs(method.init, update)


def _view(count, updates, measured=None):
    """Stacked gradients as a view, measured at all leaves or at some."""
    return tasks.GramView(
        count,
        lambda: tasks.gram(updates if measured is None else measured),
        lambda weights: tasks.combine(weights, updates),
        lambda weights, keep: tasks.combine(weights, tasks.drop_tasks(keep, updates)),
    )


def _beside(
    view: tasks.GramView, fixed: jax.Array, values: jax.Array
) -> tasks.GramView:
    """A view of the other tasks, to whose combination those of fixed weight come."""
    others = jnp.outer(~fixed, ~fixed)
    weights_of = lambda weights: jnp.where(fixed, values, weights)
    some = view.combine_some
    return tasks.GramView(
        view.num_tasks,
        lambda: jnp.where(others, view.compute(), 0),
        lambda weights: view.combine(weights_of(weights)),
        some and (lambda weights, keep: some(weights_of(weights), keep | fixed)),
        lambda: jnp.where(others, view.compute_apart(), 0),
    )


@contextlib.contextmanager
def weights_alone(wrapper):
    """Says that no way to get gradients helps a method that reads them in there."""
    try:
        yield
    except tasks.NeedsTaskGrads as error:
        raise TypeError(
            f"{wrapper} works with the weights that a method makes, but this method"
            " reads the task gradients themselves; take one whose row in"
            " optax_mtl.METHODS reads 'gram' or 'losses'"
        ) from error


@contextlib.contextmanager
def no_state_of_parameters(wrapper, method):
    """Says that an optimizer goes behind what hands it weights for gradients."""
    try:
        yield
    except tasks.NeedsTaskGrads:
        raise
    except (TypeError, ValueError) as error:
        shapes = [jax.eval_shape(method.init, jnp.zeros(n)) for n in (1, 2)]
        if not tasks.differing_shapes(*shapes):
            raise
        raise TypeError(
            f"{wrapper} works with the weights that a method makes, but what follows"
            " the method in its chain has a state of the size of the parameters: put"
            f" that after it, as in optax.chain({wrapper}(...), optax.adamw(1e-3))"
        ) from error


def weigh(wrapper, method, count, updates, state, params=None, **extra_args):
    """The weights of a method, which tasks are present, and its new state.

    With parameters, the gradients count as read by a method if it measures them.
    """

    def call(compute, state):
        with weights_alone(wrapper), no_state_of_parameters(wrapper, method):
            return method.update(tasks.GramView(count, compute), state, **extra_args)

    asked = []

    def probe():
        asked.append(True)
        return jnp.eye(count)

    jax.eval_shape(lambda state: call(probe, state), state)
    exists = jnp.ones(count, bool)
    if asked:
        tasks.check_stacked(updates, params, gram_suffices=True)
        gram = tasks.gram(updates)
        exists = tasks.present(gram)
    elif extra_args.get("losses") is not None:
        exists = tasks.stack_losses(extra_args["losses"], count) != 0
    weights, state = call(lambda: gram, state)
    # Weights that are not finite are passed on whatever the task.
    return weights, exists | ~jnp.isfinite(weights), state


class SmoothWeightsState(NamedTuple):
    """State of :func:`smooth_weights`."""

    seen: jax.Array  # Whether the task has been seen, shape `(T,)`.
    weights: jax.Array  # Smoothed weights, shape `(T,)`.
    inner: optax.OptState  # Of the method.


def smooth_weights(
    method: optax.GradientTransformationExtraArgs,
    num_tasks: int,
    decay: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the weights of a method over the steps (CR-MOGM).

    .. math::

      \lambda_t = a \lambda_{t-1} + (1 - a) w_t, \quad d = \sum_i \lambda_{t,i} g_i

    with :math:`\lambda_0 = w_0`. The weights of one batch follow its noise, and are
    correlated with it; the average is not. CR-MOGM is any method in here;
    ``update_every(smooth_weights(mgda(), num_tasks), k, num_tasks)`` is PSMGD.

    Args:
      method: any method that makes its weights from inner products or losses; not
        from the gradients themselves.
      num_tasks: number of tasks, T.
      decay: :math:`a`. In [0, 1].

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.smooth_weights(optax_mtl.mgda(), 2, decay=0.5)
      >>> state = method.init(jnp.zeros(2))
      >>> _, state = method.update(jnp.array([[1.0, 0], [0, 1]]), state)
      >>> update, _ = method.update(jnp.array([[1.0, 0], [0, 2]]), state)
      >>> print(jnp.array_str(update, precision=3))
      [0.65 0.7 ]

    References:
      Zhou et al, On the Convergence of Stochastic Multi-Objective Gradient
      Manipulation and Beyond, NeurIPS 2022

    .. note::
      The paper lets the decay rise towards 1 as the learning rate falls, such as
      one minus the ratio of the learning rate to the initial one:
      :func:`optax.inject_hyperparams` takes such a schedule.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("decay", decay, "[0, 1]")
    method = arguments.as_transformation("method", method)

    def init(params):
        return SmoothWeightsState(
            seen=jnp.zeros(num_tasks, bool),
            weights=jnp.zeros(num_tasks),
            inner=method.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, params, num_tasks, gram_suffices=True)
        if count is None:
            return updates, state
        weights, exists, inner = weigh(
            "smooth_weights", method, count, updates, state.inner, **extra_args
        )
        average = decay * state.weights + (1 - decay) * weights
        average = jnp.where(state.seen, average, weights)
        new_state = SmoothWeightsState(
            seen=state.seen | exists,
            weights=jnp.where(exists, average, state.weights),
            inner=inner,
        )
        out = tasks.combine(jnp.where(exists, average, 0), updates)
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


class UpdateEveryState(NamedTuple):
    """State of :func:`update_every`."""

    steps: jax.Array  # Number of them, scalar.
    weights: jax.Array  # Of the last step that computed them, shape `(T,)`.
    inner: optax.OptState  # Of the method.


def update_every(
    method: optax.GradientTransformationExtraArgs, k: int, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    r"""Computes the weights of a method every k steps, and reuses them in between.

    .. math::

      d_t = \sum_i w_i g_{t,i}, \quad w = w(g_{k \lfloor t / k \rfloor})

    In between, the Gram matrix is not computed at all: where the gradients are
    known through their Gram matrix only, such a step costs one backward pass.
    Around ``smooth_weights(mgda(), num_tasks)`` this is PSMGD.

    Args:
      method: any method that makes its weights from inner products or losses; not
        from the gradients themselves.
      k: number of steps. At least 1.
      num_tasks: number of tasks, T.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.update_every(optax_mtl.mgda(), k=2, num_tasks=2)
      >>> state = method.init(jnp.zeros(2))
      >>> _, state = method.update(jnp.array([[1.0, 0], [0, 1]]), state)
      >>> update, _ = method.update(jnp.array([[1.0, 0], [0, 2]]), state)
      >>> print(jnp.array_str(update, precision=3))
      [0.5 1. ]

    References:
      Xu et al, `PSMGD: Periodic Stochastic Multi-Gradient Descent for Fast
      Multi-Objective Optimization <https://arxiv.org/abs/2412.10961>`_, AAAI 2025

    .. note::
      A task that is absent when the weights are computed keeps its last weight, 0
      at first.
    """
    arguments.check_count("k", k)
    arguments.check_count("num_tasks", num_tasks)
    method = arguments.as_transformation("method", method)

    def init(params):
        return UpdateEveryState(
            steps=jnp.zeros([], jnp.int32),
            weights=jnp.zeros(num_tasks),
            inner=method.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, params, num_tasks, gram_suffices=True)
        if count is None:
            return updates, state

        def compute():
            weights, exists, inner = weigh(
                "update_every", method, count, updates, state.inner, **extra_args
            )
            weights = weights.astype(state.weights.dtype)
            return jnp.where(exists, weights, state.weights), inner

        weights, inner = jax.lax.cond(
            state.steps % k == 0, compute, lambda: (state.weights, state.inner)
        )
        out = tasks.combine(weights, updates)
        new_state = UpdateEveryState(
            optax.safe_increment(state.steps), weights=weights, inner=inner
        )
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def per_group(
    method: optax.GradientTransformationExtraArgs,
    labels: Labels,
) -> optax.GradientTransformationExtraArgs:
    """Applies a method to each group of parameters on its own: a layer, a block.

    Conflicts differ from layer to layer, and one Gram matrix for all parameters
    averages them. Each group has its own Gram matrix, weights and state.

    Args:
      method: any method.
      labels: the name of the group of each parameter: a tree of names, a function of
        the path of a parameter, such as ``"encoder/layer_1/kernel"``, or one of the
        parameters to such a tree.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = {"a": jnp.array([[1.0], [-1]]), "b": jnp.array([[1.0], [3]])}
      >>> method = optax_mtl.per_group(optax_mtl.mgda(), lambda path: path)
      >>> state = method.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> print(method.update(updates, state)[0])
      {'a': Array([0.], dtype=float32), 'b': Array([1.], dtype=float32)}
    """
    method = arguments.as_transformation("method", method)

    def partition(tree):
        names = labels_of(tree, labels, "labels")
        methods = dict.fromkeys(jax.tree.leaves(names), method)
        return optax.partition(methods, lambda _: names)

    def init(params):
        return partition(params).init(params)

    def update(updates, state, params=None, **extra_args):
        reader = "per_group measures one Gram matrix for each group, it"
        tasks.check_stacked(updates, params, reader=reader)
        out, new_state = partition(updates).update(updates, state, params, **extra_args)
        # One step for all groups: where one is not finite, all keep their state.
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def measure_on(
    method: optax.GradientTransformation, mask: Labels
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the weights of a method from some parameters, and applies them to all.

    .. math::

      G = \sum_{p \in M} G^{(p)}, \qquad d = \sum_i w_i(G) \, g_i

    over the measured parameters :math:`M`, such as those of the last shared layer, as
    GradNorm and VQGAN have it. With ``measure=`` of :func:`value_and_grad`, the
    backward passes that measure stop there, too.

    Args:
      method: any method that makes its weights from inner products or losses, or a
        chain that begins with one; not from the gradients themselves.
      mask: which parameters are measured: a tree of bools, a function of the path of a
        parameter, or one of the parameters to such a tree.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      TypeError: at the update, for a method that reads the gradients themselves.
      ValueError: at the update, for a mask that marks nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = {"first": jnp.eye(2), "last": jnp.array([[1.0], [-3]])}
      >>> method = optax_mtl.measure_on(optax_mtl.mgda(), lambda path: path == "last")
      >>> print(method.update(updates, method.init(None))[0])
      {'first': Array([0.75, 0.25], dtype=float32), 'last': Array([0.], dtype=float32)}

    References:
      Chen et al, `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks <https://arxiv.org/abs/1711.02257>`_, ICML 2018

    .. note::
      A task whose gradient is zero at the measured parameters is absent.
    """
    method = arguments.as_transformation("method", method)

    def update(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, params, reader="measure_on")
        if count is None:
            return updates, state
        marks = jax.tree.leaves(mask_of(updates, mask, "mask"))
        measured = [x for x, mark in zip(jax.tree.leaves(updates), marks) if mark]
        if not measured:
            raise ValueError(
                "the mask of measure_on marks none of the parameters, so that there is"
                " nothing to measure"
            )
        view = _view(count, updates, measured)
        with weights_alone("measure_on"):
            return method.update(view, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(method.init, update)


def with_sharded_parameters(
    method: optax.GradientTransformationExtraArgs,
    axis_name: str | tuple[str, ...],
    *,
    sharded: Labels | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes a method exact where :func:`jax.shard_map` splits the parameters.

    .. math::

      G = \sum_{s} G^{(s)}, \quad d^{(s)} = \sum_i w_i(G) \, g_i^{(s)}

    over the shards :math:`s`: all devices agree on the weights by one all-reduce of
    ``T x T`` numbers, and on whether the update is finite. Sharded ``jax.jit`` needs
    no such wrapper.

    Args:
      method: any method that makes its weights from inner products or losses; not
        from the gradients themselves.
      axis_name: axis of the mesh, or axes, over which the parameters are split.
      sharded: which parameters are split: a tree of bools, a function of the path of
        a parameter, or one of the parameters to such a tree; the others must be equal
        on all devices. ``None``: all.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> import optax_mtl
      >>> from jax.sharding import Mesh, PartitionSpec
      >>> mesh = Mesh(np.array(jax.devices()[:1]), "shard")
      >>> method = optax_mtl.with_sharded_parameters(optax_mtl.mgda(), "shard")
      >>> step = jax.shard_map(
      ...   lambda updates: method.update(updates, method.init(None))[0],
      ...   mesh=mesh, in_specs=PartitionSpec(None, "shard"),
      ...   out_specs=PartitionSpec("shard"),
      ... )
      >>> update = step(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      >>> print(jnp.array_str(update, precision=3))
      [0.8 0.4]

    .. note::
      Gradients must be averaged over the data before, as without this wrapper.
    """
    method = arguments.as_transformation("method", method)

    def update(updates, state, params=None, **extra_args):
        reader = "with_sharded_parameters"
        count = tasks.check_stacked(updates, params, reader=reader)
        if count is None:
            return updates, state

        def compute():
            mask = mask_of(updates, sharded, "sharded")
            leaves = list(zip(jax.tree.leaves(updates), jax.tree.leaves(mask)))
            split = [x for x, is_split in leaves if is_split]
            whole = [x for x, is_split in leaves if not is_split]
            gram = lambda leaves: tasks.gram(leaves) if leaves else 0
            return jax.lax.psum(gram(split), axis_name) + gram(whole)

        view = tasks.GramView(count, compute)
        with weights_alone(reader), no_state_of_parameters(reader, method):
            weights, new_state = method.update(view, state, **extra_args)
        out = tasks.combine(weights, updates)
        # All devices agree on the state, too.
        failed = jax.lax.psum(~base.all_finite(out) + 0, axis_name)
        return out, base.keep_if(failed == 0, new_state, state)

    return optax.GradientTransformationExtraArgs(method.init, update)
