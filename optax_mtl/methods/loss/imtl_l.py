"""Impartial multi-task learning, the balance of losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


class IMTLLState(NamedTuple):
    """State of :func:`imtl_l`."""

    log_weights: jax.Array  # Shape `(T,)`.
    optimizer: optax.OptState  # Of each of them.


@names.by_name("min_losses")
def imtl_l(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Impartial learning by the losses (IMTL-L): weighted losses of equal size.

    Learns weights :math:`w_i = e^{s_i}` along with the model,

    .. math::

      \min_{\theta, s} \sum_i e^{s_i} L_i(\theta) - s_i,

    whose optimum makes :math:`w_i L_i = 1` for each task.

    Args:
      num_tasks: number of tasks, T.
      optimizer: of the logarithms of the weights, which it sees one by one; by
        default ``optax.adam(0.025)``.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound there is no optimum, and the
        weights are NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> method = optax_mtl.imtl_l(num_tasks=2, optimizer=optax.sgd(0.1))
      >>> updates, state = jnp.eye(2), method.init(jnp.zeros(2))
      >>> for _ in range(200):
      ...   weights, state = method.update(
      ...     updates, state, losses=jnp.array([2.0, 0.5])
      ...   )
      >>> print(jnp.array_str(weights, precision=3))
      [0.5 2. ]

    References:
      Liu et al, `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    .. note::
      In the paper the optimizer of the model updates the weights, too.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    optimizer = arguments.as_transformation(
        "optimizer", optax.adam(0.025) if optimizer is None else optimizer
    )

    def step(state, losses):
        exists = losses != 0
        weights = jnp.where(exists, jnp.exp(state.log_weights), 0)
        return weights, learn_balance(state, optimizer, losses, exists)

    return base.from_state(
        lambda: init_balance(num_tasks, optimizer),
        step,
        num_tasks,
        reads=["losses"],
        min_losses=min_losses,
    )


def init_balance(num_tasks: int, optimizer: optax.GradientTransformation) -> IMTLLState:
    """Weights of 1 and a state of the optimizer for each."""
    log_weights = jnp.zeros(num_tasks)
    return IMTLLState(log_weights, jax.vmap(optimizer.init)(log_weights))


def learn_balance(
    state: IMTLLState,
    optimizer: optax.GradientTransformation,
    losses: jax.Array,
    exists: jax.Array,
) -> IMTLLState:
    """One step on the objective of :func:`imtl_l` for the tasks that are present."""
    gradient = jnp.exp(state.log_weights) * losses - 1
    return IMTLLState(
        *base.update_each(
            exists, optimizer, gradient, state.optimizer, state.log_weights
        )
    )
