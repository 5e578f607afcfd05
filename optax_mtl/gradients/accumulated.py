"""Gradients of several tasks, accumulated over micro-batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import guards, tasks
from optax_mtl.gradients.backward import stack_task_losses, take_aux
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels, mask_of


def accumulate_task_grads(
    losses_fn: Callable[..., Any],
    num_microbatches: int,
    *,
    has_aux: bool = False,
    shared: Labels | None = None,
    one_task_each: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Makes a function that averages task gradients over micro-batches.

    .. math::

      g_i = \frac{1}{K} \sum_{k=0}^{K-1} \nabla_\theta L_i(\theta; b_k)

    or, with ``one_task_each``, where micro-batch :math:`k` serves task
    :math:`k \bmod T` alone,

    .. math::

      g_i = \frac{T}{K} \sum_{k \bmod T = i} \nabla_\theta L_i(\theta; b_k).

    The micro-batches run one after the other inside one step, each in the memory
    that it alone needs. With one task each, all of them together cost what the
    plain sum of the losses costs: one forward and one backward pass each, through
    the head of one task.

    Args:
      losses_fn: as in :func:`value_and_task_grads`. With ``one_task_each``, return
        a dict: out of a vector, the losses that are not wanted are computed too.
      num_microbatches: :math:`K`; with ``one_task_each`` a multiple of T.
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      shared: which parameters all tasks share, as in :func:`value_and_task_grads`.
      one_task_each: whether each micro-batch serves one task, in turn.
      dtype: of the accumulators and of what is returned; by default that of each
        parameter.

    Returns:
      A function of the parameters and further arguments that returns
      ``(losses, updates)``, or ``((losses, aux), updates)``. Each positional
      argument is split along the leading axes of its arrays, every K-th example to
      one micro-batch, so that examples sharded over devices stay where they are;
      keyword arguments are handed on whole. The losses are averages; ``aux`` has a
      leading axis of size K.

    Raises:
      ValueError: at the call, if a batch does not split into K equal parts, or K
        is not a multiple of T with ``one_task_each``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda w, x: {"a": (w * x).mean(), "b": (w**2 * x).mean()}
      >>> fn = optax_mtl.accumulate_task_grads(losses_fn, num_microbatches=2)
      >>> x = jnp.array([1.0, 2, 3, 6])
      >>> print(fn(jnp.ones([]), x)[1])
      [3. 6.]
      >>> fn = optax_mtl.accumulate_task_grads(losses_fn, 2, one_task_each=True)
      >>> print(fn(jnp.ones([]), x)[1])  # Of x[::2] and x[1::2].
      [2. 8.]

    References:
      Limarenko et al, `GCond: Gradient Conflict Resolution via Accumulation-based
      Stabilization for Large-Scale Multi-Task Learning
      <https://arxiv.org/abs/2509.07252>`_, 2025, for both modes
    """

    def fn(params, *args, **kwargs):
        batches = jax.tree.map(lambda x: _split_batch(x, num_microbatches), args)
        first = jax.tree.map(lambda x: x[0], batches)
        like = jax.eval_shape(losses_fn, params, *first, **kwargs)
        like, _ = take_aux(like, has_aux)
        num_tasks = jax.eval_shape(stack_task_losses, like).size
        per_task = num_microbatches
        if one_task_each:
            per_task = _per_task(num_microbatches, num_tasks, "num_microbatches")
        shared_part, heads = split(params, shared)

        def add_all_tasks(totals, batch):
            def losses_of(shared_part, heads):
                params = merge(shared_part, heads)
                value = losses_fn(params, *batch, **kwargs)
                losses = value[0] if has_aux else value
                return stack_task_losses(losses), value

            vector, pull_back, value = jax.vjp(
                losses_of, shared_part, heads, has_aux=True
            )

            def add_task(total, inputs):
                task, cotangent = inputs
                return _add_at(total, task, pull_back(cotangent)[0], per_task), None

            basis = jnp.diag(jnp.ones_like(vector))
            total, _ = jax.lax.scan(add_task, totals[0], (jnp.arange(num_tasks), basis))
            grads = pull_back(jnp.ones_like(vector))[1]
            aux = value[1] if has_aux else None
            return (total, _add(totals[1], grads, per_task)), (vector, aux)

        def grads_of_one(task, batch):
            def loss_fn(shared_part, heads):
                params = merge(shared_part, heads)
                value = losses_fn(params, *batch, **kwargs)
                losses, aux = value if has_aux else (value, None)
                leaves = jax.tree.leaves(losses)
                # Picked from the leaves, so that the others are never computed.
                loss = leaves[0][task] if jnp.ndim(leaves[0]) else leaves[task]
                return tasks.stack_losses(loss, 1)[0], aux

            value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
            return value_and_grad(shared_part, heads)

        def add_one_task(totals, inputs):
            task, batch = inputs
            if hasattr(like, "shape"):
                out, grads = grads_of_one(task, batch)
            else:
                each = [partial(grads_of_one, i) for i in range(num_tasks)]
                out, grads = jax.lax.switch(task, each, batch)
            total = _add_at(totals[0], task, grads[0], per_task)
            return (total, _add(totals[1], grads[1], per_task)), out

        totals = _zeros(shared_part, dtype, num_tasks), _zeros(heads, dtype)
        if one_task_each:
            in_turn = jnp.arange(num_microbatches) % num_tasks
            totals, out = jax.lax.scan(add_one_task, totals, (in_turn, batches))
        else:
            totals, out = jax.lax.scan(add_all_tasks, totals, batches)
        vectors, aux = out
        losses = _like_losses(vectors.reshape(per_task, num_tasks).mean(axis=0), like)
        return ((losses, aux) if has_aux else losses), merge(*totals)

    return fn


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`."""

    mini_step: jax.Array  # Calls since the last step of the wrapped chain.
    gradient_step: jax.Array  # Steps of the wrapped chain.
    losses: jax.Array  # Accumulated losses, shape `(T,)`.
    acc_grads: optax.Updates  # Accumulated gradients, stacked.
    inner_opt_state: optax.OptState  # Of the wrapped chain.


def multi_steps(
    tx: optax.GradientTransformation,
    every_k: int,
    num_tasks: int,
    *,
    shared: Labels | None = None,
    one_task_each: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates the gradients of every ``every_k`` calls, then takes one step.

    .. math::

      g_i = \frac{1}{K} \sum_{k=0}^{K-1} g_i^{(k)}

    Wraps a whole chain that begins with a method, as :class:`optax.MultiSteps`,
    which cannot hold the task axis, wraps a chain that does not. In between the
    updates are zero and the state of the chain is left alone.

    Args:
      tx: a chain that consumes the task axis.
      every_k: number of calls to a step, K; with ``one_task_each`` a multiple of T.
      num_tasks: number of tasks, T.
      shared: which parameters all tasks share, as in :func:`value_and_task_grads`;
        the updates of the others are accumulated as they are.
      one_task_each: whether each call hands over the ordinary gradient of the loss
        of one task, the one that :func:`next_task` names, and optionally that loss,
        instead of the gradients and losses of all. The averages are then over the
        calls of each task.
      accumulator_dtype: of the accumulators and of what the chain receives; by
        default that of each parameter.

    Returns:
      A gradient transformation whose state is a :class:`MultiStepsState`.

    Raises:
      ValueError: if ``every_k`` does not suit the number of tasks; at the call, for
        updates of another shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> chain = optax.chain(optax_mtl.linear(), optax.sgd(1.0))
      >>> tx = optax_mtl.multi_steps(chain, every_k=2, num_tasks=2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for updates in jnp.array([[[1.0, 0], [0, 4]], [[3.0, 0], [0, 0]]]):
      ...   update, state = tx.update(updates, state, params)
      ...   print(update, optax_mtl.has_updated(state))
      [0. 0.] False
      [-2. -2.] True
    """
    tx = optax.with_extra_args_support(tx)
    per_task = every_k
    if one_task_each:
        per_task = _per_task(every_k, num_tasks, "every_k")

    def init(params):
        shared_part, heads = split(params, shared)
        totals = (
            _zeros(shared_part, accumulator_dtype, num_tasks),
            _zeros(heads, accumulator_dtype),
        )
        return MultiStepsState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            losses=jnp.zeros(num_tasks),
            acc_grads=merge(*totals),
            inner_opt_state=tx.init(params),
        )

    def update(updates, state, params=None, *, losses=None, **extra_args):
        if isinstance(updates, tasks.GramView):
            updates.refuse("multi_steps, which accumulates them,")
        mask = mask_of(updates if params is None else params, shared, "shared")
        (shared_part, heads), (totals, head_totals) = (
            split(tree, mask) for tree in (updates, state.acc_grads)
        )
        vector = state.losses
        if one_task_each:
            task = next_task(state)
            totals = _add_at(totals, task, shared_part, per_task)
            if losses is not None:
                loss = losses if jnp.ndim(losses) == 0 else losses[task]
                share = jnp.asarray(loss / per_task, vector.dtype)
                vector = vector.at[task].add(share)
        else:
            tasks.check_stacked(shared_part, None, num_tasks)
            totals = _add(totals, shared_part, per_task)
            if losses is not None:
                share = tasks.stack_losses(losses, num_tasks) / per_task
                vector += share.astype(vector.dtype)
        accumulated = merge(totals, _add(head_totals, heads, per_task))
        extra_args["losses"] = None if losses is None else vector
        step = lambda: tx.update(
            accumulated, state.inner_opt_state, params, **extra_args
        )
        wait = lambda: (guards.zero_outputs(step, accumulated), state.inner_opt_state)
        last = state.mini_step == every_k - 1
        out, inner_opt_state = jax.lax.cond(last, step, wait)
        restart = lambda x: jnp.where(last, jnp.zeros_like(x), x)
        return out, MultiStepsState(
            mini_step=restart(state.mini_step + 1),
            gradient_step=jnp.where(
                last, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            losses=restart(vector),
            acc_grads=jax.tree.map(restart, accumulated),
            inner_opt_state=inner_opt_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def has_updated(state: MultiStepsState) -> jax.Array:
    """Whether the last call of :func:`multi_steps` took a step of the chain."""
    return (jnp.asarray(state.mini_step) == 0) & (jnp.asarray(state.gradient_step) > 0)


def next_task(state: MultiStepsState) -> jax.Array:
    """Whose gradient :func:`multi_steps` with ``one_task_each`` expects next."""
    return jnp.asarray(state.mini_step) % state.losses.shape[0]


def _per_task(count: int, num_tasks: int, name: str) -> int:
    if count % num_tasks:
        below = count - count % num_tasks
        near = f"{below} or {below + num_tasks}" if below else str(num_tasks)
        raise ValueError(
            f"{name}={count} does not divide into {num_tasks} tasks, one to each"
            f" micro-batch: every task needs as many as the others; use {near}"
        )
    return count // num_tasks


def _split_batch(x: jax.Array, count: int) -> jax.Array:
    """Every ``count``-th example to one micro-batch: sharded examples stay put."""
    if jnp.ndim(x) == 0 or len(x) % count:
        raise ValueError(
            f"an array of shape {jnp.shape(x)} does not split into {count}"
            " micro-batches of equal size along its leading axis; choose another batch"
            " size, and pass what is not a batch by keyword"
        )
    return jnp.swapaxes(x.reshape(len(x) // count, count, *x.shape[1:]), 0, 1)


def _zeros(params: Any, dtype: Any, num_tasks: int | None = None) -> Any:
    """Zeros like the parameters, with a task axis if given; sharded as they are."""

    def zeros(p):
        leaf = jnp.zeros_like(p, dtype=dtype)
        shape = leaf.shape if num_tasks is None else (num_tasks, *leaf.shape)
        return jnp.broadcast_to(leaf, shape)

    return jax.tree.map(zeros, params)


def _add(totals: Any, grads: Any, count: int) -> Any:
    """Adds what one of ``count`` micro-batches contributes, in full precision."""

    def add(total, grad):
        if total.shape != jnp.shape(grad):
            raise ValueError(
                f"expected updates of shape {total.shape}, got {jnp.shape(grad)}"
            )
        return (total + grad / count).astype(total.dtype)

    return jax.tree.map(add, totals, grads)


def _add_at(totals: Any, task: jax.Array, grads: Any, count: int) -> Any:
    """The same for the gradient of one task."""

    def add(total, grad):
        row = jax.lax.dynamic_index_in_dim(total, task, keepdims=False)
        row = _add(row, grad, count)
        return jax.lax.dynamic_update_index_in_dim(total, row, task, 0)

    return jax.tree.map(add, totals, grads)


def _like_losses(vector: jax.Array, like: Any) -> Any:
    """The vector ``(T,)`` in the structure that ``losses_fn`` returns."""
    if hasattr(like, "shape"):
        return vector
    return jax.tree.unflatten(jax.tree.structure(like), list(vector))
