"""Guards against non-finite gradients, and against a forgotten method."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, tasks

_CONDITIONAL = (
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    optax.MultiStepsState,
)


def apply_if_finite(
    tx: optax.GradientTransformation, max_consecutive_errors: int
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose task gradients, losses or updates are not finite.

    Wraps a whole chain that begins with a method, as :func:`optax.apply_if_finite`
    wraps one that does not: instead of a step there are updates of zero, and the
    state of the chain stays as it was.

    Args:
      tx: a chain that consumes the task axis.
      max_consecutive_errors: so many steps in a row are skipped; the next is taken. At
        least 0.

    Returns:
      A gradient transformation whose state is an ``optax.ApplyIfFiniteState``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> chain = optax.chain(optax_mtl.linear(), optax.sgd(1.0))
      >>> tx = optax_mtl.apply_if_finite(chain, max_consecutive_errors=5)
      >>> params = jnp.zeros(2)
      >>> update, state = tx.update(
      ...     jnp.array([[1.0, 2], [jnp.nan, 0]]), tx.init(params), params
      ... )
      >>> print(update, state.total_notfinite)
      [0. 0.] 1
    """
    arguments.check_count("max_consecutive_errors", max_consecutive_errors, least=0)
    tx = arguments.as_transformation("tx", tx)

    def init(params):
        return optax.apply_if_finite(tx, max_consecutive_errors).init(params)

    def update(updates, state, params=None, *, losses=None, **extra_args):
        if isinstance(updates, tasks.GramView):
            updates.refuse(
                "apply_if_finite (optax.apply_if_finite after the method does not)"
            )
        increment = optax.safe_increment
        step = lambda: tx.update(
            updates, state.inner_state, params, losses=losses, **extra_args
        )
        stepped = step()
        # Finite gradients whose squares are not give updates that are not.
        finite = base.all_finite((updates, losses, stepped[0]))
        count = jnp.where(finite, 0, increment(state.notfinite_count))
        skipped = zero_outputs(step, updates), state.inner_state
        out, inner_state = jax.lax.cond(
            finite | (count > max_consecutive_errors), lambda: stepped, lambda: skipped
        )
        total = state.total_notfinite
        return out, optax.ApplyIfFiniteState(
            notfinite_count=count,
            last_finite=finite,
            total_notfinite=jnp.where(finite, total, increment(total)),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def checked(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same chain, refusing whatever would broadcast the parameters.

    Where a method is forgotten, or does not see all gradients, as inside
    :func:`optax.masked` or beside :func:`optax.identity` and
    :func:`optax.set_to_zero` in :func:`optax.partition`, updates keep their task axis;
    Flax's optimizers and :func:`optax.apply_updates` then broadcast the parameters
    silently. Where Adam stands before the method, its state does. The shapes tell, so
    that checking costs nothing once a step is compiled.

    Args:
      tx: a chain that consumes the task axis.

    Returns:
      A gradient transformation with the updates and the state of ``tx``.

    Raises:
      ValueError: at the update, if the updates have other shapes than the parameters,
        without parameters, and if the state changes its shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> forgotten = optax_mtl.checked(optax.sgd(1e-3))
      >>> params = {"w": jnp.zeros(3)}
      >>> forgotten.update({"w": jnp.ones((2, 3))}, forgotten.init(params), params)
      Traceback (most recent call last):
      ...
      ValueError: the update of params['w'] has shape (2, 3), the parameter (3,): \
begin the chain with a method, such as optax_mtl.linear(), which consumes the task \
axis of every leaf
    """
    tx = arguments.as_transformation("tx", tx)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "checked compares the updates with the parameters: call"
                " update(updates, state, params)"
            )
        try:
            out, new_state = tx.update(updates, state, params, **extra_args)
        except TypeError as error:
            explain_conditional(error, state)
            raise
        if isinstance(out, tasks.GramView):
            out.refuse("this chain has no method that consumes the task axis: it")
        tasks.check_resolved(out, params)
        tasks.check_state_kept(state, new_state)
        return out, new_state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def explain_conditional(error: Exception, state: optax.OptState) -> None:
    """Adds to an error why Optax's conditional wrappers fail around a chain."""
    if isinstance(error, TypeError) and isinstance(state, _CONDITIONAL):
        error.add_note(
            "Around a chain that consumes the task axis, Optax's conditional wrappers"
            " fail, since without a step they return the gradients of the tasks: put"
            " them after the method, or take optax_mtl.apply_if_finite and"
            " optax_mtl.multi_steps"
        )


def zero_outputs(step: Callable[[], Any], updates: optax.Updates) -> optax.Updates:
    """Zeros like the updates that ``step`` returns, sharded like those it is given."""
    zeros = lambda out, g: jnp.zeros_like(g[0] if g.ndim > out.ndim else g, out.dtype)
    return jax.tree.map(zeros, jax.eval_shape(step)[0], updates)


def zero_nonfinite(
    tx: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes tasks absent whose gradients or losses are not finite.

    So is a gradient that is too large to be squared in float32.

    Around a method, or a chain that begins with one, it sets the gradients and the
    losses of such tasks to 0: the method resolves the other tasks, and leaves the
    statistics of these alone. In front of a method, as a link of a chain, it hands
    nothing but gradients on; a method that reads losses then gets them as they are.

    In :func:`value_and_grad` a task is left out whose loss is not finite, or whose
    gradient is not, without harm to the others if the losses have names, as in a dict,
    and are 8 at most: then each is differentiated for itself. Losses in a vector are
    differentiated together, and a derivative that is not finite spoils what meets it
    on the way back (0 times infinity), also for the other tasks: where none is left,
    the update is zero and the state stays.

    Args:
      tx: a method, or a chain that begins with one; ``None`` for a link in front of it.

    Returns:
      A gradient transformation; with ``tx`` its updates and its state, else one from
      stacked updates to stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.zero_nonfinite(optax_mtl.gls())
      >>> updates = jnp.array([[3.0, 4], [jnp.nan, 0], [5, 6]])
      >>> losses = {"a": 2.0, "b": jnp.nan, "c": 0.5}
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)), losses=losses)
      >>> print(update)  # Of the first and the last alone.
      [5.75 7.  ]

    .. note::
      Where the gradients are known through their Gram matrix alone, it is computed in
      every step, also for a method that reads losses alone.
    """
    inner = arguments.as_transformation("tx", optax.identity() if tx is None else tx)

    def update(updates, state, params=None, *, losses=None, **extra_args):
        count = tasks.check_stacked(updates, params, gram_suffices=True)
        if count is not None:
            if isinstance(updates, tasks.GramView):
                updates = updates.apart()
            keep = tasks.finite_tasks(updates)
            if losses is not None:
                vector = tasks.stack_losses(losses, count)
                keep &= jnp.isfinite(vector)
                losses = tasks.unstack_losses(jnp.where(keep, vector, 0), losses)
            updates = tasks.drop_tasks(keep, updates)
        return inner.update(updates, state, params, losses=losses, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds updates to the parameters, and refuses to broadcast.

    Without a method in the chain the updates keep their task axis, and
    :func:`optax.apply_updates`, or ``equinox.apply_updates``, would broadcast the
    parameters to it silently. Trainers that call those themselves take
    :func:`checked` chains.

    Args:
      params: parameters.
      updates: a tree of the same structure, shapes and kinds.

    Returns:
      The updated parameters, in their own dtypes.

    Raises:
      ValueError: if a shape differs.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> optax_mtl.apply_updates({"w": jnp.zeros(3)}, {"w": jnp.zeros((2, 3))})
      Traceback (most recent call last):
      ...
      ValueError: the update of params['w'] has shape (2, 3), the parameter (3,): \
begin the chain with a method, such as optax_mtl.linear(), which consumes the task \
axis of every leaf
    """

    tasks.check_resolved(updates, params)
    return optax.apply_updates(params, updates)
