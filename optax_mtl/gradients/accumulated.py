"""Gradients of several tasks, accumulated over micro-batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import base, guards, tasks
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
    num_labels: Callable[..., Any] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Makes a function that averages task gradients over micro-batches.

    .. math::

      g_i = \frac{1}{\sum_k n_{ik}}
      \sum_{k=0}^{K-1} n_{ik} \nabla_\theta L_i(\theta; b_k)

    where :math:`n_{ik}` is 1 if task :math:`i` is present in micro-batch :math:`k`,
    its loss not being exactly zero, and otherwise 0; or the number of its labels
    there, if ``num_labels`` tells it. With ``one_task_each`` micro-batch :math:`k`
    serves task :math:`k \bmod T` alone, and each sum is over those of the task.

    The micro-batches run one after the other inside one step, each in the memory
    that it alone needs. With one task each, all of them together cost what the
    plain sum of the losses costs: one forward and one backward pass each, through
    the head of one task.

    Args:
      losses_fn: as in :func:`value_and_task_grads`. With ``one_task_each``, return
        a dict: out of a vector, the losses that are not wanted are computed too.
      num_microbatches: :math:`K`; with ``one_task_each`` a multiple of T. At least 1.
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      shared: which parameters all tasks share, as in :func:`value_and_task_grads`.
      one_task_each: whether each micro-batch serves one task, in turn.
      num_labels: maps what ``losses_fn`` gets beside the parameters to the number of
        labels of each task in the micro-batch, in the form of the losses. Where each
        loss is an average over its labels, the result is exactly that of the whole
        batch in one piece.
      dtype: of the accumulators and of what is returned; by default that of each
        parameter.

    Returns:
      A function of the parameters and further arguments that returns
      ``(losses, updates)``, or ``((losses, aux), updates)``. Each positional
      argument is split along the leading axes of its arrays, every K-th example to
      one micro-batch, so that examples sharded over devices stay where they are;
      keyword arguments are handed on whole. The losses are averages as the gradients
      are; ``aux`` has a leading axis of size K.

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

      Two labels in one micro-batch, one in the other:

      >>> def masked(w, x, mask):
      ...   return {"a": (w * x * mask).sum() / jnp.maximum(mask.sum(), 1)}
      >>> fn = optax_mtl.accumulate_task_grads(
      ...     masked, 2, num_labels=lambda x, mask: {"a": mask.sum()}
      ... )
      >>> print(fn(jnp.ones([]), x, jnp.array([1.0, 1, 1, 0]))[1])  # Of 1, 2 and 3.
      [2.]

    References:
      Limarenko et al, `GCond: Gradient Conflict Resolution via Accumulation-based
      Stabilization for Large-Scale Multi-Task Learning
      <https://arxiv.org/abs/2509.07252>`_, 2025, for both modes

    .. note::
      To the methods a zero gradient is an absent task. Dividing by K would make a
      task smaller by the share of the micro-batches that miss its labels, the more
      the larger K; to do so nevertheless, count one label for each task everywhere.
      Without ``num_labels`` a head is averaged over the micro-batches in which its
      gradient is not zero, which is exact unless tasks that share it are absent at
      different times. Under `shard_map` each device counts what it has.
    """
    base.check_count("num_microbatches", num_microbatches)
    base.check_choice("has_aux", has_aux, (True, False))
    base.check_choice("one_task_each", one_task_each, (True, False))

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
        axes = [_manual_axes(p) for p in jax.tree.leaves(shared_part)]
        kept_apart = frozenset.intersection(*axes) if axes else frozenset()

        def present(losses):
            """Whether a task is, on any device whose gradients are summed with ours."""
            exists = (losses != 0).astype(jnp.int32)
            summed = _manual_axes(losses) - kept_apart
            exists = jax.lax.pmax(exists, tuple(summed)) if summed else exists
            return _vary(exists, kept_apart)

        weights = None
        if num_labels is not None:
            weights = _shares(
                partial(num_labels, **kwargs), batches, num_tasks, one_task_each
            )

        def add_all_tasks(average, inputs):
            step, batch, weight = inputs

            def losses_of(shared_part, heads):
                params = merge(shared_part, heads)
                value = losses_fn(params, *batch, **kwargs)
                losses = value[0] if has_aux else value
                return stack_task_losses(losses), value

            vector, pull_back, value = jax.vjp(
                losses_of, shared_part, heads, has_aux=True
            )
            cotangents = jnp.ones_like(vector)
            rates, counts = (jnp.ones(num_tasks),) * 2, average.counts
            if weight is None:
                rates, counts = _rates(counts, present(vector), step)
            else:
                cotangents = cotangents * weight.astype(vector.dtype)

            def add_task(total, inputs):
                task, cotangent, rates = inputs
                return _add_at(total, task, pull_back(cotangent)[0], rates), None

            each = (jnp.arange(num_tasks), jnp.diag(cotangents), rates)
            total, _ = jax.lax.scan(add_task, average.shared, each)
            grads = pull_back(cotangents)[1]
            new = _Average(total, counts, average.heads, average.head_counts)
            aux = value[1] if has_aux else None
            return _add_heads(new, grads, 0, weight is None), (vector, aux)

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

        def add_one_task(average, inputs):
            step, batch, weight = inputs
            task = step % num_tasks
            if hasattr(like, "shape"):
                out, grads = grads_of_one(task, batch)
            else:
                each = [partial(grads_of_one, i) for i in range(num_tasks)]
                out, grads = jax.lax.switch(task, each, batch)
            rates: Any = (1.0, weight)
            counts = average.counts
            if weight is None:
                rates, count = _rates(counts[task], present(out[0]), step // num_tasks)
                counts = counts.at[task].set(count)
            total = _add_at(average.shared, task, grads[0], rates)
            new = _Average(total, counts, average.heads, average.head_counts)
            counting, weight = weight is None, 1.0 if weight is None else weight
            return _add_heads(new, grads[1], task, counting, weight), out

        average = _Average(
            shared=base.zeros_like(shared_part, num_tasks, dtype=dtype),
            counts=_vary(jnp.zeros(num_tasks), kept_apart),
            heads=base.zeros_like(heads, dtype=dtype),
            head_counts=_no_counts(heads, num_tasks if one_task_each else 1),
        )
        steps = jnp.arange(num_microbatches)
        add = add_one_task if one_task_each else add_all_tasks
        average, (vectors, aux) = jax.lax.scan(add, average, (steps, batches, weights))
        vectors = vectors.reshape(per_task, num_tasks)
        if weights is None:
            mean = vectors.sum(axis=0) / jnp.maximum((vectors != 0).sum(axis=0), 1)
        else:
            mean = jnp.sum(weights.reshape(vectors.shape) * vectors, axis=0)
        losses = _like_losses(mean, like)
        updates = merge(average.shared, average.heads)
        return ((losses, aux) if has_aux else losses), updates

    return fn


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`."""

    mini_step: jax.Array  # Calls since the last step of the wrapped chain.
    gradient_step: jax.Array  # Steps of the wrapped chain.
    losses: jax.Array  # Averages of the losses so far, shape `(T,)`.
    acc_grads: optax.Updates  # Averages of the gradients so far, stacked.
    counts: jax.Array  # Labels of each task, or calls with any, shape `(T,)`.
    head_counts: Any  # The same for each head.
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

      g_i = \frac{1}{\sum_k n_{ik}} \sum_{k=0}^{K-1} n_{ik} \, g_i^{(k)}

    where :math:`n_{ik}` is 1 if task :math:`i` is present in call :math:`k`, its loss
    (without losses, its gradient) not being exactly zero, and otherwise 0; or the
    number of its labels, the optional extra argument ``num_labels``, shape ``(T,)``.

    Wraps a whole chain that begins with a method, as :class:`optax.MultiSteps`,
    which cannot hold the task axis, wraps a chain that does not. In between the
    updates are zero and the state of the chain is left alone.

    Args:
      tx: a chain that consumes the task axis.
      every_k: number of calls to a step, K; with ``one_task_each`` a multiple of T. At
        least 1.
      num_tasks: number of tasks, T.
      shared: which parameters all tasks share, as in :func:`value_and_task_grads`;
        the updates of the others are accumulated as they are.
      one_task_each: whether each call hands over the ordinary gradient of the loss
        of one task, the one that :func:`next_task` names, and optionally that loss
        and number of labels, instead of those of all tasks. The averages are then
        over the calls of each task.
      accumulator_dtype: of the accumulators and of what the chain receives; by
        default that of each parameter.

    Returns:
      A gradient transformation whose state is a :class:`MultiStepsState`. What
      :func:`accumulate_task_grads` says about heads holds here, too.

    Raises:
      ValueError: if ``every_k`` does not suit the number of tasks; at the call, for
        updates of another shape, and for ``num_labels`` beside heads whose gradients
        are sums over the tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> chain = optax.chain(optax_mtl.linear(), optax.sgd(1.0))
      >>> tx = optax_mtl.multi_steps(chain, every_k=2, num_tasks=2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for updates in jnp.array([[[1.0, 0], [0, 4]], [[3.0, 0], [0, 0]]]):  # Absent.
      ...   update, state = tx.update(updates, state, params)
      ...   print(update, optax_mtl.has_updated(state))
      [0. 0.] False
      [-2. -4.] True
    """
    base.check_count("every_k", every_k)
    base.check_count("num_tasks", num_tasks)
    base.check_choice("one_task_each", one_task_each, (True, False))
    tx = optax.with_extra_args_support(tx)
    if one_task_each:
        _per_task(every_k, num_tasks, "every_k")

    def init(params):
        shared_part, heads = split(params, shared)
        totals = (
            base.zeros_like(shared_part, num_tasks, dtype=accumulator_dtype),
            base.zeros_like(heads, dtype=accumulator_dtype),
        )
        return MultiStepsState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            losses=jnp.zeros(num_tasks, float),
            acc_grads=merge(*totals),
            counts=jnp.zeros(num_tasks, float),
            head_counts=_no_counts(heads, num_tasks if one_task_each else 1),
            inner_opt_state=tx.init(params),
        )

    def update(
        updates, state, params=None, *, losses=None, num_labels=None, **extra_args
    ):
        if isinstance(updates, tasks.GramView):
            updates.refuse("multi_steps, which accumulates them,")
        mask = mask_of(updates if params is None else params, shared, "shared")
        (shared_part, heads), (totals, head_totals) = (
            split(tree, mask) for tree in (updates, state.acc_grads)
        )
        if one_task_each:
            task = next_task(state)
            step = state.mini_step // num_tasks
            pick = lambda x: x if jnp.ndim(x) == 0 else x[task]
            losses, num_labels = jax.tree.map(pick, (losses, num_labels))
            present = lambda: tasks.has_gradient(
                jax.tree.map(lambda x: x[None], shared_part)
            )[0]
            count = state.counts[task]
        else:
            task, step = jnp.int32(0), state.mini_step
            tasks.check_stacked(shared_part, None, num_tasks)
            if losses is not None:
                losses = tasks.stack_losses(losses, num_tasks)
            if num_labels is not None:
                num_labels = tasks.stack_losses(num_labels, num_tasks)
                if jax.tree.leaves(heads):
                    raise ValueError(
                        "the gradient of a head is a sum over the tasks, which"
                        " num_labels would weigh differently; use"
                        " optax_mtl.accumulate_task_grads, or one_task_each=True"
                    )
            present = lambda: tasks.has_gradient(shared_part)
            count = state.counts
        weight = num_labels
        if weight is None:
            weight = present() if losses is None else losses != 0
        rates, count = _rates(count, weight, step)
        vector = state.losses
        if one_task_each:
            totals = _add_at(totals, task, shared_part, rates)
            if losses is not None:
                vector = vector.at[task].set(_blend(vector[task], losses, rates))
            count = state.counts.at[task].set(count)
        else:
            each = lambda total, grad: _add(
                total, grad, [tasks.along_tasks(rate, total) for rate in rates]
            )
            totals = jax.tree.map(each, totals, shared_part)
            if losses is not None:
                vector = _blend(vector, losses, rates)
        average = _add_heads(
            _Average(totals, count, head_totals, state.head_counts),
            heads,
            task,
            True,
            1.0 if num_labels is None else num_labels,
        )
        accumulated = merge(average.shared, average.heads)
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
            counts=restart(average.counts),
            head_counts=jax.tree.map(restart, average.head_counts),
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


class _Average(NamedTuple):
    """Gradients averaged so far."""

    shared: Any  # Those of the shared parameters, leaves `(T, *p)`.
    counts: jax.Array  # What each task's is an average of, shape `(T,)`.
    heads: Any  # Those of the others, sums over the tasks.
    head_counts: Any  # Of each head, `(T,)` where tasks come one by one, else `(1,)`.


def _no_counts(params: Any, size: int) -> Any:
    """No labels for each head; varying over devices as it does."""
    count = lambda p: jnp.broadcast_to(jnp.zeros_like(p, float).sum(), (size,))
    return jax.tree.map(count, params)


def _rates(
    count: jax.Array, weight: jax.Array, step: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """What to multiply the average so far and the next value by; the next count.

    What was absent in all steps so far is averaged over all of them: it is zero, or
    the gradient of a loss that is exactly zero wherever it is.
    """
    total = count + weight
    share = weight / jnp.where(total > 0, total, 1)
    new = jnp.where(total > 0, share, 1 / (step + 1)).astype(count.dtype)
    return (1 - new, new), total.astype(count.dtype)


def _shares(
    num_labels: Callable[..., Any], batches: Any, num_tasks: int, one_task_each: bool
) -> jax.Array:
    """The share of each micro-batch in the labels of a task, ``(K, T)`` or ``(K,)``."""
    counts = jax.vmap(lambda batch: stack_task_losses(num_labels(*batch)))(batches)
    if counts.shape[1] != num_tasks:
        raise ValueError(
            f"num_labels counts the labels of {counts.shape[1]} tasks, but there are"
            f" {num_tasks} losses; return one number for each"
        )
    if one_task_each:
        in_turn = jnp.arange(len(counts))[:, None] % num_tasks
        counts = jnp.where(in_turn == jnp.arange(num_tasks)[None], counts, 0)
    total = counts.sum(axis=0, keepdims=True)
    shares = counts / jnp.where(total > 0, total, 1)
    return shares.sum(axis=1) if one_task_each else shares


def _blend(total: jax.Array, value: jax.Array, rates: Any) -> jax.Array:
    old, new = rates
    return (old * total + new * value).astype(total.dtype)


def _add(total: jax.Array, grad: jax.Array, rates: Any) -> jax.Array:
    """Adds what one micro-batch contributes, in full precision."""
    if total.shape != jnp.shape(grad):
        raise ValueError(
            f"expected updates of shape {total.shape}, got {jnp.shape(grad)}"
        )
    return _blend(total, grad, rates)


def _add_at(totals: Any, task: jax.Array, grads: Any, rates: Any) -> Any:
    """The same for the gradient of one task."""

    def add(total, grad):
        row = jax.lax.dynamic_index_in_dim(total, task, keepdims=False)
        row = _add(row, grad, rates)
        return jax.lax.dynamic_update_index_in_dim(total, row, task, 0)

    return jax.tree.map(add, totals, grads)


def _add_heads(
    average: _Average,
    grads: Any,
    task: jax.typing.ArrayLike,
    counting: bool,
    weight: jax.typing.ArrayLike = 1.0,
) -> _Average:
    """The same for the heads, each averaged over where it has a gradient.

    Args:
      average: that of the shared parameters is handed on.
      grads: gradients of the heads.
      task: whose they are, if they come one by one.
      counting: whether to count where a head has a gradient; the weights are shares of
        a known total otherwise.
      weight: number of labels, or share.
    """
    if not counting:
        share = lambda total, grad: _add(total, grad, (1.0, weight))
        return average._replace(heads=jax.tree.map(share, average.heads, grads))

    def count_in(counts, grad):
        return counts.at[task].add(jnp.where(jnp.any(grad != 0), weight, 0))

    def add(total, grad, old, new):
        # The sum over the tasks seen, each with as many labels as the others.
        per_task = lambda counts: counts.sum() / jnp.maximum((counts > 0).sum(), 1)
        before, after = per_task(old), per_task(new)
        after = jnp.where(after > 0, after, 1)
        weight_here = new.sum() - old.sum()
        return _add(total, grad, (before / after, weight_here / after))

    counts = jax.tree.map(count_in, average.head_counts, grads)
    heads = jax.tree.map(add, average.heads, grads, average.head_counts, counts)
    return average._replace(heads=heads, head_counts=counts)


def _manual_axes(x: jax.Array) -> frozenset[str]:
    """Axes of :func:`jax.shard_map` along which an array varies."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # Not in JAX 0.9.
    return kind.vma if manual is None else manual.varying


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array as one that varies along these axes at least."""
    missing = tuple(axes - _manual_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _like_losses(vector: jax.Array, like: Any) -> Any:
    """The vector ``(T,)`` in the structure that ``losses_fn`` returns."""
    if hasattr(like, "shape"):
        return vector
    return jax.tree.unflatten(jax.tree.structure(like), list(vector))
