"""Gradients of several tasks, accumulated over calls of one chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, guards, report, tasks
from optax_mtl.gradients import averaging
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels, mask_of


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`."""

    mini_step: jax.Array  # Calls since the last step of the wrapped chain.
    gradient_step: jax.Array  # Steps of the wrapped chain.
    losses: jax.Array  # Averages of the losses so far, shape `(T,)`.
    acc_grads: optax.Updates  # Averages of the gradients so far, stacked.
    counts: jax.Array  # Labels of each task, or calls with any, shape `(T,)`.
    head_counts: Any  # The same for each head.
    inner_opt_state: optax.OptState  # Of the wrapped chain.

    def __repr__(self):
        return report.describe_state(self)


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
        and number of labels (or those of all tasks, of which the others are left
        out), instead of those of all tasks. The averages are then over the calls of
        each task.
      accumulator_dtype: of the accumulators and of what the chain receives; by
        default that of each parameter. Those of complex parameters stay complex.

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
    arguments.check_count("every_k", every_k)
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_choice("one_task_each", one_task_each, (True, False))
    arguments.check_dtype("accumulator_dtype", accumulator_dtype)
    tx = arguments.as_transformation("tx", tx)
    if one_task_each:
        averaging.calls_of_each_task(every_k, num_tasks, "every_k")

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
            head_counts=averaging.no_counts(heads, num_tasks if one_task_each else 1),
            inner_opt_state=tx.init(params),
        )

    def update(
        updates, state, params=None, *, losses=None, num_labels=None, **extra_args
    ):
        if isinstance(updates, tasks.GramView):
            updates.refuse("multi_steps, which accumulates them,")
        handed = losses
        tasks.check_same_names(losses, num_labels, "num_labels")
        mask = mask_of(updates if params is None else params, shared, "shared")
        (shared_part, heads), (totals, head_totals) = (
            split(tree, mask) for tree in (updates, state.acc_grads)
        )
        if one_task_each:
            task = next_task(state)
            step = state.mini_step // num_tasks
            if _of_all_tasks(losses):
                losses = tasks.stack_losses(losses, num_tasks)[task]
            if _of_all_tasks(num_labels):
                counts = tasks.stack_losses(num_labels, num_tasks, "num_labels")
                num_labels = counts[task]
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
                num_labels = tasks.stack_losses(num_labels, num_tasks, "num_labels")
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
        rates, count = averaging.rates_of(count, weight, step)
        vector = state.losses
        if one_task_each:
            totals = averaging.add_at(totals, task, shared_part, rates)
            if losses is not None:
                vector = vector.at[task].set(
                    averaging.blend(vector[task], losses, rates)
                )
            count = state.counts.at[task].set(count)
        else:
            each = lambda total, grad: averaging.add_leaf(
                total, grad, [tasks.along_tasks(rate, total) for rate in rates]
            )
            totals = jax.tree.map(each, totals, shared_part)
            if losses is not None:
                vector = averaging.blend(vector, losses, rates)
        average = averaging.add_heads(
            averaging.Average(totals, count, head_totals, state.head_counts),
            heads,
            task,
            True,
            1.0 if num_labels is None else num_labels,
        )
        accumulated = merge(average.shared, average.heads)
        if losses is not None:
            losses = tasks.unstack_losses(vector, handed)
        step = lambda: tx.update(
            accumulated, state.inner_opt_state, params, losses=losses, **extra_args
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


def _of_all_tasks(values: Any) -> bool:
    """Whether there is one for each task, rather than one or none."""
    if values is None:
        return False
    return not jax.tree_util.all_leaves([values]) or jnp.ndim(values) > 0


def has_updated(state: MultiStepsState) -> jax.Array:
    """Whether the last call of :func:`multi_steps` took a step of the chain."""
    return (jnp.asarray(state.mini_step) == 0) & (jnp.asarray(state.gradient_step) > 0)


def next_task(state: MultiStepsState) -> jax.Array:
    """Whose gradient :func:`multi_steps` with ``one_task_each`` expects next."""
    return jnp.asarray(state.mini_step) % state.losses.shape[0]
