"""Projection of less important gradients against more important ones."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_mtl import arguments, base, names, solvers


@names.by_name(of_tasks=["order"])
def priority_projection(
    order: Sequence[names.Task] | None = None, *, mode: str = "gated"
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each gradient against those of the more important tasks.

    For an order of the tasks from the most to the least important,

    .. math::

      d = \sum_i P_i(g_i), \qquad
      P_i(g) = g - \frac{\min(0, \langle g, g_j \rangle)}{\|g_j\|^2} \, g_j
      \;\; \text{for all } j < i \text{ in turn},

    so that the first gradient stays as it is, and no other one works against it.
    For two tasks this is A-GEM, with the first as the memory.

    Args:
      order: all tasks by number or by name, the most important first; by default as
        they are numbered.
      mode: ``"gated"`` projects only where two gradients conflict, as in the
        formula. A projection may undo another one before it if there are three
        tasks or more. ``"cone"`` has :math:`P_i` project onto the cone
        :math:`\{x: \langle x, g_j \rangle \ge 0 \text{ for all } j < i\}`, as GEM
        does, with a quadratic program that undoes nothing. ``"always"`` has it
        project onto the complement of all :math:`g_j`, aligned ones too.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for an unknown mode, or an order that does not name each task once.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1, 1], [6, 1, 1]])
      >>> method = optax_mtl.priority_projection(order=[1, 0])
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [5.474 2.579 2.579]

    References:
      Chaudhry et al, `Efficient Lifelong Learning with A-GEM
      <https://arxiv.org/abs/1812.00420>`_, ICLR 2019

      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017

      Yu et al, `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020, for the projection

    .. note::
      GEM and A-GEM take one more step with the projected gradient alone; here all
      tasks are trained, and the sum is taken.
    """
    arguments.check_choice("mode", mode, _MODES)
    arguments.check_static("order", order)
    if order is not None and (
        not np.iterable(order) or sorted(order) != list(range(len(order)))
    ):
        raise ValueError(
            f"the order {order} should name each task once, from 0 on, the most"
            " important first, such as [1, 0, 2]"
        )

    def step(state, gram):
        ranking = range(len(gram)) if order is None else order
        if len(ranking) != len(gram):
            raise ValueError(
                f"the order {order} is one of {len(ranking)} tasks, but there are"
                f" {len(gram)}; name each task once"
            )
        return priority_projection_weights(gram, jnp.array(ranking), mode), state

    return base.from_state(optax.EmptyState, step, reads=["gram"])


def priority_projection_weights(
    gram: jax.Array, order: jax.Array, mode: str = "gated"
) -> jax.Array:
    """Weights of :func:`priority_projection`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      order: the tasks, the most important first, shape ``(T,)``.
      mode: ``"gated"``, ``"always"`` or ``"cone"``.

    Returns:
      Array of shape ``(T,)``.
    """
    ordered, _ = solvers.normalize_gram(gram[order][:, order])
    weights = _MODES[mode](ordered).sum(axis=0)
    return jnp.zeros_like(weights).at[order].set(weights)


# Each takes the Gram matrix in order of importance. Row i of the coefficients that
# it returns expresses the projected gradient i in the gradients.


def _gated(gram):
    task = jnp.arange(len(gram))

    def project(coefficients, j):
        dots = coefficients @ gram[j]
        conflict = (task > j) & (dots < 0)
        # An absent task conflicts with none, so that the division is safe.
        step = jnp.where(conflict, dots / gram[j, j], 0)
        return coefficients.at[:, j].add(-step), None

    return lax.scan(project, jnp.eye(len(gram), dtype=gram.dtype), task)[0]


def _always(gram):
    task = jnp.arange(len(gram))

    def project(coefficients, j):
        # Gram and Schmidt: gradient j is orthogonal to all before it by now.
        reference = coefficients[j]
        dots = coefficients @ gram @ reference
        # A gradient in the span of those before it leaves rounding errors only.
        independent = dots[j] > len(gram) * jnp.finfo(gram.dtype).eps * gram[j, j]
        step = jnp.where((task > j) & independent, dots / dots[j], 0)
        return coefficients - jnp.outer(step, reference), None

    return lax.scan(project, jnp.eye(len(gram), dtype=gram.dtype), task)[0]


def _cone(gram):
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    before = jnp.tril(jnp.ones(gram.shape, bool), -1)
    return jax.vmap(solvers.dual_cone, (None, 0, 0))(gram, identity, before)


_MODES = {"gated": _gated, "always": _always, "cone": _cone}
