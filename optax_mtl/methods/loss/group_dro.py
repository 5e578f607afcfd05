"""Distributionally robust optimization over groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


class GroupDROState(NamedTuple):
    """State of :func:`group_dro`."""

    scores: jax.Array  # Sums of the losses times the step size, shape `(T,)`.


@names.by_name("preference")
def group_dro(
    num_tasks: int,
    *,
    step_size: jax.typing.ArrayLike = 0.01,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Group distributionally robust optimization: the worst mixture of the losses.

    .. math::

      \min_\theta \max_{q \in \Delta} \sum_i q_i L_i, \quad
      q_i \leftarrow q_i \exp(\eta L_i) / Z, \quad d = \sum_i q_i g_i

    where mirror ascent, one step for each of ours, follows the maximum. With a
    preference :math:`p` it is online mirror descent for the Tchebycheff scalarization,
    :math:`\min_\theta \max_i p_i L_i`: :math:`q` starts at :math:`p` and has the
    exponents :math:`\eta p_i L_i`.

    Args:
      num_tasks: number of tasks (groups), T.
      step_size: :math:`\eta`. At least 0.
      preference: :math:`p`, shape ``(T,)`` or a dict by name, at least 0. By default
        equal shares at the start, and 1 in the exponents.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``. A loss of exactly 0 means an absent
      task, whose score stays.

    Raises:
      ValueError: for a negative step size or preference.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.group_dro(num_tasks=2, step_size=0.5)
      >>> updates, state = jnp.eye(2), method.init(None)
      >>> for losses in jnp.array([[2.0, 1.0], [2.0, 1.0]]):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.731 0.269]

    References:
      Sagawa et al, `Distributionally Robust Neural Networks for Group Shifts
      <https://arxiv.org/abs/1911.08731>`_, ICLR 2020; with a preference Liu et al,
      `Online Mirror Descent for Tchebycheff Scalarization in Multi-Objective
      Optimization <https://arxiv.org/abs/2410.21764>`_, 2024
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("step_size", step_size, "[0, inf)")
    preference = arguments.check_preference(preference)

    def step(state, losses):
        shares = arguments.preference_of_losses(preference, losses)
        sizes = 1.0 if preference is None else shares
        scores = state.scores + step_size * sizes * losses
        return group_dro_weights(scores, shares), GroupDROState(scores)

    return base.from_state(
        lambda: GroupDROState(jnp.zeros(num_tasks)), step, num_tasks, reads=["losses"]
    )


def group_dro_weights(scores: jax.Array, shares: jax.Array) -> jax.Array:
    """Weights of :func:`group_dro`.

    Args:
      scores: sums of the losses times the step size, shape ``(T,)``.
      shares: what the weights start from, shape ``(T,)``, 0 for a task that is absent.

    Returns:
      Array of shape ``(T,)`` with the sum 1.
    """
    exists = shares > 0
    logits = scores + jnp.log(jnp.where(exists, shares, 1))
    return base.softmax(logits, exists)
