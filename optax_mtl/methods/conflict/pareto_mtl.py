"""Pareto MTL."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers, tasks


class ParetoMTLState(NamedTuple):
    """State of :func:`pareto_mtl`."""

    started: jax.Array  # Whether the losses have been in their cell, scalar.


@names.by_name("preference", "others")
def pareto_mtl(
    *, preference: names.PerTask | None = None, others: names.PerTask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Pareto MTL: descends for all tasks, in one of several cells of the losses.

    Preferences, vectors of unit length, divide the space of the losses into cells, by
    which of them is nearest in angle. The losses are to stay in that of :math:`u`,
    apart from those of the others :math:`u_k`:

    .. math::

      h_k(\theta) = \langle u_k - u, L \rangle \le 0, \qquad
      d = \operatorname*{argmin}_{d \in H} \|d\|, \quad
      H = \operatorname{conv}\Big(\{g_i\} \cup
      \big\{\nabla h_k: h_k \ge 0\big\}\Big)

    It starts without the :math:`g_i`, until the losses are in their cell for the first
    time. A run for each preference gives a front of trade-offs.

    Args:
      preference: :math:`u`, shape ``(T,)`` or a dict by name; by default equal for all
        tasks. Losses along it are what it asks for: a small entry is a small loss.
      others: the other :math:`u_k`, shape ``(T, K)``, a column each, or a dict by name
        of K numbers; shape ``(T,)`` for a single one. By default the T axes, the loss
        of one task alone. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the extra
      argument ``losses``, shape ``(T,)``. A loss of exactly 0, or a gradient of zero,
      means an absent task.

    Raises:
      ValueError: for negative preferences, or some of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.pareto_mtl(preference=[3.0, 4.0])
      >>> updates, state = jnp.eye(2), method.init(None)
      >>> update, state = method.update(updates, state, losses=jnp.array([9.0, 1.0]))
      >>> print(jnp.array_str(update, precision=3))  # (1, 0) - (0.6, 0.8): no descent.
      [ 0.4 -0.8]
      >>> update, state = method.update(updates, state, losses=jnp.array([3.0, 4.0]))
      >>> print(jnp.array_str(update, precision=3))
      [0.5 0.5]

    References:
      Lin et al, `Pareto Multi-Task Learning
      <https://arxiv.org/abs/1912.12854>`_, NeurIPS 2019

    .. note::
      The authors' code starts for two epochs at most, and scales the weights to a sum
      of magnitudes of T after that. Where the cell and descent for all exclude each
      other, the update is zero, as at a Pareto-stationary point.
    """
    preference = arguments.check_preference(preference)
    arguments.check_range("others", others, "[0, inf)", optional=True)

    def step(state, gram, losses):
        exists = tasks.present(gram) & (losses != 0)
        own = arguments.preference_where(preference, exists.astype(gram.dtype))
        given = jnp.eye(len(gram)) if others is None else others
        rest = _columns(jnp.asarray(given, gram.dtype), len(gram))
        normals, active = _active_constraints(losses, own, rest, exists)
        started = state.started | ~jnp.any(active)
        weights = pareto_mtl_weights(gram, normals, active, exists & started)
        return weights, ParetoMTLState(started)

    return base.from_state(
        lambda: ParetoMTLState(jnp.zeros([], bool)), step, reads=["gram", "losses"]
    )


def pareto_mtl_weights(
    gram: jax.Array, normals: jax.Array, active: jax.Array, descend: jax.Array
) -> jax.Array:
    """Weights of :func:`pareto_mtl`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      normals: weights of the losses in the constraints, shape ``(K, T)``.
      active: which constraints are, shape ``(K,)``.
      descend: which tasks are to descend, shape ``(T,)``.

    Returns:
      Array of shape ``(T,)``.
    """
    rows = jnp.concatenate([jnp.eye(len(gram), dtype=gram.dtype), normals])
    mask = jnp.concatenate([descend, active])
    hull = solvers.simplex_qp(rows @ gram @ rows.T, mask=mask)
    return jnp.where(mask, hull, 0) @ rows


def _columns(others, num_tasks):
    """The other preferences, shape ``(T, K)``."""
    if others.ndim not in (1, 2) or len(others) != num_tasks:
        raise ValueError(
            f"others has shape {others.shape}, but there are {num_tasks} tasks; give a"
            f" column for each other preference, ({num_tasks}, K)"
        )
    return others.reshape(num_tasks, -1)


def _active_constraints(losses, own, rest, exists):
    """Weights of the losses in the constraints, ``(K, T)``, and which are active."""
    unit = lambda v: v * base.reciprocal(jnp.linalg.norm(v, axis=0, keepdims=True))
    rest = unit(jnp.where(exists[:, None], rest, 0))
    normals = jnp.where(rest.any(axis=0), rest - unit(own)[:, None], 0).T
    scaled = jnp.where(exists, losses, 0)
    values = normals @ unit(scaled * base.reciprocal(jnp.max(jnp.abs(scaled))))
    # A preference among the others as well is no constraint but for rounding errors.
    return normals, values > len(losses) * jnp.finfo(losses.dtype).eps
