"""FERERO: preference-guided descent with a constraint."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers
from optax_mtl.methods.conflict.modo import (
    from_two_batches,
    move_on_simplex,
    split_batches,
    uniform,
)


class FereroState(NamedTuple):
    """State of :func:`ferero`."""

    weights: jax.Array  # Multipliers of the losses, shape `(T,)`, on the simplex.
    across: jax.Array  # Those of the constraint, shape `(T,)`, orthogonal to the ray.


@names.by_name("preference")
def ferero(
    num_tasks: int,
    *,
    preference: names.PerTask | None = None,
    gamma: jax.typing.ArrayLike = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    r"""FERERO: descent for all tasks, with the losses on a given ray.

    The constraint is :math:`P L = 0`, where :math:`P` projects onto the complement of
    the preference :math:`r`. The multipliers of both goals take one step per update,

    .. math::

      w \leftarrow \Pi_\Delta (w - \gamma \, G_1 G_2^\top \lambda), \quad
      v \leftarrow v - \gamma P (G_1 G_2^\top \lambda - \tfrac12 L), \quad
      \lambda = \frac{w + v}{\sum_i |w_i + v_i|}, \quad d = G^\top \lambda,

    with the gradients of two halves of a batch, so that their expectation is right;
    :math:`G` is that of both.

    Args:
      num_tasks: number of tasks, T.
      preference: :math:`r`, shape ``(T,)`` or a dict by name; by default equal for all
        tasks. A small entry asks for a small loss.
      gamma: step size of the multipliers; the products with the squared norms of the
        gradients, and with the losses, are what matters. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the extra
      argument ``losses``, shape ``(T,)``, of any sign; 0 means an absent task. Give it
      the gradients of the second half as the extra argument ``second_updates``; without
      it, one batch stands for both and the steps of the multipliers are biased.

    Raises:
      ValueError: for a negative preference, or one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.ferero(num_tasks=2, gamma=0.1)
      >>> state, losses = method.init(jnp.zeros(2)), jnp.array([6.0, 2.0])
      >>> for _ in range(3):  # More and more for the loss that is too large.
      ...   update, state = method.update(jnp.eye(2), state, losses=losses)
      ...   print(jnp.array_str(update, precision=3))
      [0.6 0.4]
      [0.68 0.32]
      [0.744 0.256]

    References:
      Chen et al, `FERERO: A Flexible Framework for Preference-Guided Multi-Objective
      Learning <https://arxiv.org/abs/2412.01773>`_, NeurIPS 2024

    .. note::
      The authors' code has two tasks and a row that spans the complement of the ray;
      for more, any orthonormal rows give the same. As there, :math:`\lambda` is
      normalised before it is used, which bounds the steps; but their every step begins
      from equal :math:`w`.
    """
    arguments.check_count("num_tasks", num_tasks)
    preference = arguments.check_preference(preference)
    arguments.check_range("gamma", gamma, "[0, inf)")

    def init_fn():
        return FereroState(uniform(num_tasks), jnp.zeros(num_tasks, float))

    def step(state, gram, losses):
        cross, exists = split_batches(gram, num_tasks)
        exists = exists & (losses != 0)
        ray = arguments.preference_where(preference, exists.astype(gram.dtype))
        ray = ray * base.reciprocal(jnp.linalg.norm(ray))
        project = lambda v: jnp.where(exists, v - ray * (ray @ v), 0)

        normalize = lambda v: v * base.reciprocal(jnp.sum(jnp.abs(v)))

        now, _ = move_on_simplex(state.weights, exists, lambda w: w)
        across = project(jnp.where(exists, state.across, 0))
        slope = jnp.where(exists, cross @ normalize(now + across), 0)
        move = lambda w: solvers.project_simplex(w - gamma * slope, exists)
        weights, stored = move_on_simplex(state.weights, exists, move)
        across = across - gamma * project(slope - jnp.where(exists, losses, 0) / 2)
        new_state = FereroState(stored, jnp.where(exists, across, state.across))
        return normalize(weights + across), new_state

    return from_two_batches(init_fn, step, num_tasks, reads=["gram", "losses"])
