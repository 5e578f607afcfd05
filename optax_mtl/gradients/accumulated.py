"""Gradients of several tasks, accumulated over micro-batches inside one step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, tasks
from optax_mtl.gradients import averaging
from optax_mtl.gradients.backward import (
    check_losses_floating,
    pull_back_in_turn,
    stack_task_losses,
    take_aux,
    vector_fn,
)
from optax_mtl.gradients.own_data import own_gradients, own_losses
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels


def accumulate_task_grads(
    losses_fn: Callable[..., Any],
    num_microbatches: int,
    *,
    has_aux: bool = False,
    shared: Labels | None = None,
    one_task_each: bool = False,
    own_data: bool = False,
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
      own_data: whether each task has data of its own, as in
        :func:`value_and_task_grads`: ``losses_fn`` returns the loss of one task. Of an
        array of shape ``(T, n, ...)`` the second axis is split, and one of shape
        ``(T,)``, such as the numbers of the tasks, goes whole to every micro-batch.
        ``num_labels`` then counts for one task, too.
      num_labels: maps what ``losses_fn`` gets beside the parameters to the number of
        labels of each task in the micro-batch, in the form of the losses. Where each
        loss is an average over its labels, the result is exactly that of the whole
        batch in one piece.
      dtype: of the accumulators and of what is returned; by default that of each
        parameter. Those of complex parameters stay complex.

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
    arguments.check_count("num_microbatches", num_microbatches)
    arguments.check_choice("has_aux", has_aux, (True, False))
    arguments.check_choice("one_task_each", one_task_each, (True, False))
    arguments.check_choice("own_data", own_data, (True, False))
    arguments.check_dtype("dtype", dtype)
    if own_data and one_task_each:
        raise ValueError(
            "one_task_each serves one task in each micro-batch, own_data all of them:"
            " choose one"
        )
    if num_labels is not None:
        arguments.check_function("num_labels", num_labels)
    loss_of_one = losses_fn
    if own_data:
        losses_fn = own_losses(loss_of_one, has_aux)

    def fn(params, *args, **kwargs):
        cut = _split_own_data if own_data else _split_batch
        batches = jax.tree.map(lambda x: cut(x, num_microbatches), args)
        first = jax.tree.map(lambda x: x[0], batches)
        like = jax.eval_shape(losses_fn, params, *first, **kwargs)
        like, _ = take_aux(like, has_aux)
        num_tasks = jax.eval_shape(stack_task_losses, like).size
        check_losses_floating(like)
        per_task = num_microbatches
        if one_task_each:
            per_task = averaging.calls_of_each_task(
                num_microbatches, num_tasks, "num_microbatches"
            )
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
            counts_of = partial(num_labels, **kwargs)
            if own_data:
                of_one = lambda _, *batch: num_labels(*batch, **kwargs)
                counts_of = partial(own_losses(of_one, False), None)
            counts = jax.eval_shape(counts_of, *first)
            tasks.check_same_names(like, counts, "num_labels")
            weights = _shares(counts_of, batches, num_tasks, one_task_each)

        def add_all_tasks(average, inputs):
            step, batch, weight = inputs

            primals = shared_part, heads
            losses, push_forward, value = jax.linearize(
                vector_fn(losses_fn, has_aux, batch, kwargs), *primals, has_aux=True
            )
            vector = tasks.stack_losses(losses, None)
            cotangents = jnp.ones_like(vector)
            rates, counts = (jnp.ones(num_tasks),) * 2, average.counts
            if weight is None:
                rates, counts = averaging.rates_of(counts, present(vector), step)
            else:
                cotangents = cotangents * weight.astype(vector.dtype)

            listed = isinstance(losses, list)
            of_all = lambda rows: list(rows) if listed else rows
            pull_back_from = pull_back_in_turn(push_forward, primals, losses)

            def add_task(total, inputs):
                task, cotangent, rates = inputs
                grads, _ = pull_back_from(task, cotangent)
                return averaging.add_at(total, task, grads, rates), None

            if own_data:
                total = add_own(average.shared, batch, cotangents, rates)
            else:
                each = (jnp.arange(num_tasks), of_all(jnp.diag(cotangents)), rates)
                total, _ = jax.lax.scan(add_task, average.shared, each)
            pull_back = jax.linear_transpose(push_forward, *primals)
            grads = pull_back(of_all(cotangents))[1]
            new = averaging.Average(total, counts, average.heads, average.head_counts)
            aux = value[1] if has_aux else None
            return averaging.add_heads(new, grads, 0, weight is None), (vector, aux)

        def add_own(total, batch, factors, rates):
            primals = shared_part, heads
            _, updates = own_gradients(loss_of_one, has_aux, primals, batch, kwargs)
            old, new = rates
            add = jax.vmap(averaging.add_leaf)
            each = lambda t, g: add(t, g, (old, new * factors))
            return jax.tree.map(each, total, updates)

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
                rates, count = averaging.rates_of(
                    counts[task], present(out[0]), step // num_tasks
                )
                counts = counts.at[task].set(count)
            total = averaging.add_at(average.shared, task, grads[0], rates)
            new = averaging.Average(total, counts, average.heads, average.head_counts)
            counting, weight = weight is None, 1.0 if weight is None else weight
            return averaging.add_heads(new, grads[1], task, counting, weight), out

        average = averaging.Average(
            shared=base.zeros_like(shared_part, num_tasks, dtype=dtype),
            counts=_vary(jnp.zeros(num_tasks), kept_apart),
            heads=base.zeros_like(heads, dtype=dtype),
            head_counts=averaging.no_counts(heads, num_tasks if one_task_each else 1),
        )
        steps = jnp.arange(num_microbatches)
        add = add_one_task if one_task_each else add_all_tasks
        average, (vectors, aux) = jax.lax.scan(add, average, (steps, batches, weights))
        vectors = vectors.reshape(per_task, num_tasks)
        if weights is None:
            mean = vectors.sum(axis=0) / jnp.maximum((vectors != 0).sum(axis=0), 1)
        else:
            mean = jnp.sum(weights.reshape(vectors.shape) * vectors, axis=0)
        losses = tasks.unstack_losses(mean, like)
        updates = merge(average.shared, average.heads)
        return ((losses, aux) if has_aux else losses), updates

    return fn


def _split_batch(x: jax.Array, count: int) -> jax.Array:
    """Every ``count``-th example to one micro-batch: sharded examples stay put."""
    if jnp.ndim(x) == 0 or len(x) % count:
        raise ValueError(
            f"an array of shape {jnp.shape(x)} does not split into {count}"
            " micro-batches of equal size along its leading axis; choose another batch"
            " size, and pass what is not a batch by keyword"
        )
    return jnp.swapaxes(x.reshape(len(x) // count, count, *x.shape[1:]), 0, 1)


def _split_own_data(x: jax.Array, count: int) -> jax.Array:
    """The same for the examples of each task, behind the axis of the tasks."""
    if jnp.ndim(x) == 1:
        return jnp.broadcast_to(x, (count, *x.shape))
    return jax.vmap(lambda y: _split_batch(y, count), out_axes=1)(x)


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


def _manual_axes(x: jax.Array) -> frozenset[str]:
    """Axes of :func:`jax.shard_map` along which an array varies."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # Not in JAX 0.9.
    return kind.vma if manual is None else manual.varying


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array as one that varies along these axes at least."""
    missing = tuple(axes - _manual_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
