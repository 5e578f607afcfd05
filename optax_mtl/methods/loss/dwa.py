"""Dynamic weight average."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, report


class DWAState(NamedTuple):
    """State of :func:`dwa`."""

    seen: jax.Array  # Number of losses of each task so far, shape `(T,)`.
    history: jax.Array  # Losses of the last `2 * window` steps, `(2 * window, T)`.

    def __repr__(self):
        return report.describe_state(self)


@names.by_name("min_losses")
def dwa(
    num_tasks: int,
    *,
    temperature: jax.typing.ArrayLike = 2.0,
    window: int = 25,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic weight average (DWA): more weight for losses that fall slowly.

    .. math::

      w = T \operatorname{softmax}(r / \tau), \quad
      r_i = \frac{\bar{L}_i(t - 1)}{\bar{L}_i(t - 2)},

    where :math:`\bar{L}_i(t - 1)` and :math:`\bar{L}_i(t - 2)` are the averages of
    the loss over the last ``window`` steps and over the ``window`` steps before
    them. Until a task has been seen in ``2 * window`` steps its ratio is 1.

    Args:
      num_tasks: number of tasks, T.
      temperature: :math:`\tau`; a large one makes the weights equal. Positive.
      window: number of steps in an average. The paper compares epochs: give the number
        of steps in one. At least 1.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Ratios of losses of either sign say nothing:
        below its bound one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Raises:
      ValueError: for a temperature or a window that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.dwa(num_tasks=2, window=1)
      >>> updates, state = jnp.eye(2), method.init(jnp.zeros(2))
      >>> for losses in jnp.array([[2.0, 1.0], [1.0, 1.0], [1.0, 1.0]]):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.876 1.124]

    References:
      Liu et al, `End-To-End Multi-Task Learning With Attention
      <https://arxiv.org/abs/1803.10704>`_, CVPR 2019

    .. note::
      Some implementations average the weighted losses instead of summing them.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("temperature", temperature, "(0, inf)")
    arguments.check_count("window", window)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")

    def init_fn():
        return DWAState(
            seen=jnp.zeros(num_tasks, jnp.int32),
            history=jnp.ones((2 * window, num_tasks)),
        )

    def step(state, losses):
        recent, older = jnp.split(state.history, 2)
        known = state.seen >= 2 * window
        rates = jnp.where(known, recent.sum(axis=0) / older.sum(axis=0), 1.0)
        exists = losses != 0
        weights = dwa_weights(jnp.where(exists, rates, 0), temperature)
        history = jnp.concatenate([losses[None], state.history[:-1]])
        return weights, DWAState(
            seen=jnp.where(exists, optax.safe_increment(state.seen), state.seen),
            history=jnp.where(exists, history, state.history),
        )

    return base.from_state(
        init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses
    )


def dwa_weights(rates: jax.Array, temperature: jax.typing.ArrayLike = 2.0) -> jax.Array:
    """Weights of :func:`dwa` from the ratios of the losses, ``(T,)``, 0 if absent."""
    exists = rates != 0
    return exists.sum() * base.softmax(rates / temperature, exists)
