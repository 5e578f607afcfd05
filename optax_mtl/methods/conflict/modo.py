"""Multi-objective gradient descent with double sampling."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers, tasks


class MoDoState(NamedTuple):
    """State of :func:`modo`."""

    weights: jax.Array  # Shape `(T,)`, on the simplex.


def modo(
    num_tasks: int,
    *,
    gamma: jax.typing.ArrayLike = 0.1,
    rho: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Multi-objective gradient with double sampling (MoDo).

    One projected step per update towards the weights of :func:`~optax_mtl.mgda`,
    with two independent batches, so that its expectation is right:

    .. math::

      \lambda \leftarrow \Pi_\Delta \big(
      \lambda - \gamma (G_1 G_2^\top \lambda + \rho \lambda) \big), \quad
      d = \tfrac12 (G_1 + G_2)^\top \lambda

    Args:
      num_tasks: number of tasks, T.
      gamma: step size of the weights; the product with the squared norms of the
        gradients is what matters. At least 0.
      rho: strength of the pull towards equal weights. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates. Give it those of the
      second batch as the extra argument ``second_updates``; without it, one batch
      stands for both and the step of the weights is biased.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.modo(num_tasks=2)
      >>> first, second = jnp.array([[2.0, 0], [0, 1]]), jnp.array([[1.0, 0], [0, 1]])
      >>> state = method.init(jnp.zeros(2))
      >>> update, _ = method.update(first, state, second_updates=second)
      >>> print(jnp.array_str(update, precision=4))
      [0.7125 0.525 ]

    References:
      Chen et al, `Three-Way Trade-Off in Multi-Objective Learning: Optimization,
      Generalization and Conflict-Avoidance <https://arxiv.org/abs/2305.20057>`_,
      NeurIPS 2023

    .. note::
      The authors' code adds the two batches instead of averaging them; another
      implementation applies the weights to a third batch, and has ``gamma=1e-3``.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("gamma", gamma, "[0, inf)")
    arguments.check_range("rho", rho, "[0, inf)")

    def step(state, gram):
        cross, exists = split_batches(gram, num_tasks)
        move = lambda w: solvers.project_simplex(
            w - gamma * (cross @ w + rho * w), exists
        )
        weights, stored = move_on_simplex(state.weights, exists, move)
        return weights, MoDoState(stored)

    return from_two_batches(lambda: MoDoState(uniform(num_tasks)), step, num_tasks)


def uniform(num_tasks: int) -> jax.Array:
    """Equal weights that sum to 1, shape ``(T,)``."""
    return jnp.full(num_tasks, 1 / num_tasks, jnp.result_type(float))


def move_on_simplex(
    weights: jax.Array, exists: jax.Array, move: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Moves weights on the simplex of the tasks that are present.

    Args:
      weights: on the simplex of all tasks, shape ``(T,)``.
      exists: tasks that are present, shape ``(T,)``.
      move: from and to weights on their simplex, zero for other tasks.

    Returns:
      The new weights on the simplex of the tasks present, and on that of all tasks,
      where an absent task keeps its weight.
    """
    share = jnp.sum(weights, where=exists)
    equal = exists / jnp.maximum(exists.sum(), 1)
    scaled = jnp.where(exists, weights, 0) / jnp.where(share > 0, share, 1)
    new = move(jnp.where(share > 0, scaled, equal))
    new = jnp.where(exists, new, 0)
    return new, jnp.where(exists, share * new, weights)


def from_two_batches(
    init_fn: Callable[[], Any],
    step: Callable[..., tuple[jax.Array, Any]],
    num_tasks: int,
    *,
    reads: Sequence[str] = ("gram",),
) -> optax.GradientTransformationExtraArgs:
    """Makes a method that reads two batches: :func:`base.from_state` with both.

    Args:
      init_fn: returns the initial state.
      step: maps the state and the Gram matrix of one batch, ``(T, T)``, or of both
        together, ``(2 T, 2 T)``, to weights of shape ``(T,)`` and the next state.
      num_tasks: number of tasks, T.
      reads: as in :func:`base.from_state`. The losses, shape ``(T,)``, are one vector
        for both batches.

    Returns:
      A gradient transformation that aggregates stacked updates, or the average of
      two if it gets the extra argument ``second_updates``.
    """

    def both_step(state, gram, **losses):
        first = jax.tree.map(lambda x: x[:num_tasks], losses)
        weights, state = step(state, gram, **first)
        return jnp.concatenate([weights, weights]) / 2, state

    one = base.from_state(init_fn, step, num_tasks, reads=reads)
    two = base.from_state(init_fn, both_step, 2 * num_tasks, reads=reads)

    def update(
        updates, state, params=None, *, second_updates=None, losses=None, **extra_args
    ):
        if second_updates is None:
            return one.update(updates, state, params, losses=losses, **extra_args)
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        try:
            tasks.check_stacked(second_updates, params, num_tasks)
        except (TypeError, ValueError) as error:
            error.add_note("This is about the second_updates.")
            raise
        join = lambda first, second: jnp.concatenate([first, second])
        both = jax.tree.map(join, updates, second_updates)
        if "losses" in reads:
            losses = jnp.tile(tasks.stack_losses(losses, num_tasks), 2)
        return two.update(both, state, params, losses=losses, **extra_args)

    return optax.GradientTransformationExtraArgs(one.init, update)


def split_batches(gram: jax.Array, num_tasks: int) -> tuple[jax.Array, jax.Array]:
    """Inner products of the first with the second batch, and who is in both.

    Args:
      gram: Gram matrix of one batch, which stands for both, or of both.
      num_tasks: number of tasks, T.

    Returns:
      Arrays of shape ``(T, T)`` and ``(T,)``.
    """
    exists = tasks.present(gram)
    return gram[:num_tasks, -num_tasks:], exists[:num_tasks] & exists[-num_tasks:]
