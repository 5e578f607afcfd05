"""Direction-oriented multi-objective gradient descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, names, solvers, tasks
from optax_mtl.methods.conflict.modo import (
    from_two_batches,
    move_on_simplex,
    split_batches,
    uniform,
)

_STEPS = 20


class SDMGradState(NamedTuple):
    """State of :func:`sdmgrad`."""

    weights: jax.Array  # Of the last pair of batches, shape `(T,)`, on the simplex.


@names.by_name("preference")
def sdmgrad(
    num_tasks: int,
    *,
    regularization: jax.typing.ArrayLike = 0.3,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Direction-oriented multi-objective gradient descent (SDMGrad).

    Between :func:`~optax_mtl.mgda` and a fixed direction, the average gradient:

    .. math::

      d = \frac{G^\top (w + \lambda p)}{1 + \lambda}, \quad
      w = \arg\min_{w \in \Delta} \tfrac12 \| G^\top (w + \lambda p) \|^2

    From one batch, :math:`w` is exact. From two independent batches it follows the
    unbiased operator :math:`w \mapsto G_1 G_2^\top (w + \lambda p)`, in 20 projected
    steps from the weights of the last update, and :math:`d` is that of the average of
    the two.

    Args:
      num_tasks: number of tasks, T.
      regularization: :math:`\lambda`. At least 0.
      preference: :math:`p`, shape ``(T,)`` or a dict by name; by default ``1 / T`` for
        each task that is present.

    Returns:
      A gradient transformation that aggregates stacked updates; with those of a
      second batch as the extra argument ``second_updates`` if there is one.

    Raises:
      ValueError: for a negative preference, or one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> method = optax_mtl.sdmgrad(num_tasks=2)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [0.8 0.4]

    References:
      Xiao et al, `Direction-oriented Multi-objective Learning: Simple and Provable
      Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, NeurIPS 2023

    .. note::
      The paper applies the weights to a third batch. In the authors' code the three
      batches are one, the class has ``regularization=0.6``, and the steps have a
      fixed size of 10 and momentum, and do not converge; here their size is the
      inverse of the Frobenius norm of the matrix.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("regularization", regularization, "[0, inf)")
    preference = arguments.check_preference(preference)

    def step(state, gram):
        two = len(gram) == 2 * num_tasks
        matrix, exists = split_batches(solvers.normalize_gram(gram)[0], num_tasks)
        p = arguments.preference_where(
            preference, exists.astype(gram.dtype), default_total=1.0
        )
        if two:
            move = lambda w: sdmgrad_steps(matrix, w, regularization, p)
            weights, stored = move_on_simplex(state.weights, exists, move)
            state = SDMGradState(stored)
        else:
            weights = sdmgrad_weights(matrix, regularization, p)
        return (weights + regularization * p) / (1 + regularization), state

    return from_two_batches(lambda: SDMGradState(uniform(num_tasks)), step, num_tasks)


def sdmgrad_weights(
    gram: jax.Array, regularization: jax.typing.ArrayLike, preference: jax.Array
) -> jax.Array:
    """The exact weights w of :func:`sdmgrad` on the simplex, from one batch.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      regularization: as in :func:`sdmgrad`.
      preference: shape ``(T,)``.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = tasks.present(gram)
    weights = solvers.simplex_qp(gram, (gram @ preference) * regularization, exists)
    return jnp.where(exists, weights, 0)


def sdmgrad_steps(
    matrix: jax.Array,
    weights: jax.Array,
    regularization: jax.typing.ArrayLike,
    preference: jax.Array,
) -> jax.Array:
    """Projected steps of :func:`sdmgrad` from two batches.

    Args:
      matrix: inner products of the first with the second batch, shape ``(T, T)``.
      weights: the start, on the simplex, shape ``(T,)``.
      regularization: as in :func:`sdmgrad`.
      preference: shape ``(T,)``, 0 for a task that is absent.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = jnp.any(matrix != 0, axis=1)
    size = jnp.linalg.norm(matrix)
    matrix = matrix / jnp.where(size > 0, size, 1)

    def body(_, w):
        return solvers.project_simplex(
            w - matrix @ (w + regularization * preference), exists
        )

    return jax.lax.fori_loop(0, _STEPS, body, weights)
