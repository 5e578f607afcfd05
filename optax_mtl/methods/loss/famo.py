"""Fast adaptive multitask optimization."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks


class FAMOState(NamedTuple):
    """State of :func:`famo`."""

    logits: jax.Array  # Of the weights, shape `(T,)`.
    losses: jax.Array  # Last of each task above its bound, 0 before it, `(T,)`.
    losses_after: jax.Array  # From `famo_update`; 0 where unknown, `(T,)`.
    optimizer: optax.OptState  # Of each logit.


@names.by_name("min_losses")
def famo(
    num_tasks: int,
    *,
    gamma: jax.typing.ArrayLike = 1e-3,
    min_losses: names.PerTask = 0.0,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fast adaptive multitask optimization (FAMO): all losses fall at equal rates.

    The model follows the gradient of a weighted sum of log losses,

    .. math::

      d = \sum_i w_i g_i, \quad
      w_i = \frac{z_i / D_i}{\sum_j z_j / D_j}, \quad
      z = \operatorname{softmax}(\xi), \quad D_i = L_i - b_i,

    and gradient descent moves :math:`\xi` towards tasks whose loss :math:`D_i` fell
    less in the last step, to :math:`D_i'`, at the price of no further gradient:

    .. math::

      \delta_i = \log D_i - \log D_i', \quad
      \nabla_{\xi_i} = z_i (\delta_i - \langle z, \delta \rangle) + \gamma \xi_i

    The paper takes :math:`D'` from the same batch after the step. That is what
    happens if each step ends with :func:`famo_update`. Without it, the losses of the
    next batch stand in: no extra forward pass, but more noise.

    Args:
      num_tasks: number of tasks, T.
      gamma: decay of the logits. At least 0.
      min_losses: :math:`b`, lower bounds of the losses, one number, shape ``(T,)`` or a
        dict by name. Below its bound a loss has no logarithm, and the weights are NaN.
      optimizer: of the logits, which it sees one by one; by default
        ``optax.adam(0.025)``.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses, after = jnp.array([2.0, 0.5, 1.0]), jnp.array([1.5, 0.45, 1.05])
      >>> method = optax_mtl.famo(num_tasks=3)
      >>> state = method.init(jnp.zeros(3))
      >>> weights, state = method.update(jnp.eye(3), state, losses=losses)
      >>> print(jnp.array_str(weights, precision=3))
      [0.143 0.571 0.286]
      >>> state = optax_mtl.famo_update(state, after)  # The same batch, after the step.
      >>> weights, state = method.update(jnp.eye(3), state, losses=losses)
      >>> print(jnp.array_str(weights, precision=3))
      [0.137 0.575 0.288]

    References:
      Liu et al, `FAMO: Fast Adaptive Multitask Optimization
      <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023

    .. note::
      The authors' code and scripts use ``gamma`` from 1e-5 to 1e-2, and some of it
      clips the update, as ``optax.clip_by_global_norm(1.0)`` does. It adds 1e-8 to
      :math:`D_i`; here nothing is added, so that the units of the losses do not
      matter.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("gamma", gamma, "[0, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    optimizer = arguments.as_transformation(
        "optimizer", optax.adam(0.025) if optimizer is None else optimizer
    )

    def init_fn():
        logits = jnp.zeros(num_tasks)
        return FAMOState(
            logits=logits,
            losses=jnp.zeros(num_tasks),
            losses_after=jnp.zeros(num_tasks),
            optimizer=jax.vmap(optimizer.init)(logits),
        )

    def step(state, losses):
        known = jnp.any(state.losses_after != 0)
        reported = base.losses_above(state.losses_after, min_losses)
        after = jnp.where(known, reported, losses)
        seen = (state.losses > 0) & (after > 0) & jnp.isfinite(after)
        ratio = jnp.where(seen, state.losses, 1) / jnp.where(seen, after, 1)
        gradient = famo_gradient(state.logits, jnp.log(ratio), seen)
        logits, opt_state = base.update_each(
            seen,
            optimizer,
            gradient + gamma * state.logits,
            state.optimizer,
            state.logits,
        )
        new_state = FAMOState(
            logits=logits,
            losses=jnp.where(losses != 0, losses, state.losses),
            losses_after=jnp.zeros(num_tasks),
            optimizer=opt_state,
        )
        return famo_weights(logits, losses), new_state

    return base.from_state(
        init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses
    )


def famo_update(state: Any, losses: Any) -> Any:
    """Tells :func:`famo` the losses of the last batch after the step.

    Args:
      state: state of the method, or of any chain that contains it.
      losses: losses of the batch of the last step with the new parameters: shape
        ``(T,)`` or a dict of scalars.

    Returns:
      The state, with the losses that the next update is to learn from.

    Raises:
      ValueError: if there is no state of :func:`famo` in it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> chain = optax.chain(optax_mtl.famo(num_tasks=2), optax.adamw(1e-3))
      >>> state = chain.init(jnp.zeros(3))
      >>> state = optax_mtl.famo_update(state, jnp.array([1.0, 2.0]))
      >>> print(optax.tree.get(state, "losses_after"))
      [1. 2.]
    """
    is_famo = lambda x: isinstance(x, FAMOState)
    leaves = jax.tree.leaves(state, is_leaf=is_famo)
    if not any(map(is_famo, leaves)):
        raise ValueError("there is no state of optax_mtl.famo in this state")

    def record(x):
        if not is_famo(x):
            return x
        after = tasks.stack_losses(losses, len(x.logits))
        return x._replace(losses_after=after.astype(x.losses_after.dtype))

    return jax.tree.map(record, state, is_leaf=is_famo)


def famo_weights(logits: jax.Array, losses: jax.Array) -> jax.Array:
    """Weights of :func:`famo`, from the logits and the losses above their bounds."""
    ratios = base.softmax(logits, losses != 0) * base.reciprocal(losses)
    return ratios * base.reciprocal(ratios.sum())


def famo_gradient(logits: jax.Array, fall: jax.Array, seen: jax.Array) -> jax.Array:
    """Gradient by which :func:`famo` learns, without the decay.

    Args:
      logits: shape ``(T,)``.
      fall: logarithms of the losses before the step over those after it, ``(T,)``.
      seen: tasks for which both are known, shape ``(T,)``.

    Returns:
      Array of shape ``(T,)``.
    """
    z = base.softmax(logits, seen)
    return z * (fall - z @ fall)
