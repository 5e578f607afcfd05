"""Momentum conflict-free gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, report, tasks
from optax_mtl.methods.conflict.config import config_weights


class MConFIGState(NamedTuple):
    """State of :func:`m_config`."""

    first: optax.Updates  # First moments of the tasks, float32, `(T, *p)`.
    counts: jax.Array  # Steps of each task, shape `(T,)`.
    direction: optax.Updates  # The last direction, with its bias as a moment.
    second: optax.Updates  # Second moment of what the direction averages.
    steps: jax.Array  # Number of directions so far, scalar.

    def __repr__(self):
        return report.describe_state(self)


def m_config(
    num_tasks: int,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum conflict-free gradients (M-ConFIG): one task's gradient a step.

    Resolves momenta instead of gradients, so that a step needs new gradients of some
    tasks only: those of one task after the other cost as little as the plain sum.

    .. math::

      m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i \text{ if } g_i \ne 0, \quad
      d = \operatorname{ConFIG}(\hat{m}_1, \ldots, \hat{m}_T), \quad
      \frac{d}{\sqrt{\hat{s}} + \epsilon}

    where :math:`\hat{s}` is the second moment, as in Adam, of the gradients of which
    :math:`d` would be the first moment. The update is zero in the first round, until
    every task has been seen or one has been seen again; tasks that have not been seen
    are left out. Chain it with :func:`optax.scale_by_learning_rate`, not with Adam.

    Args:
      num_tasks: number of tasks, T.
      b1: decay of the first moments. In [0, 1).
      b2: decay of the second moment. In [0, 1).
      eps: added to the denominator. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates. A gradient of zeros
      stands for one that was not computed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.m_config(num_tasks=2)
      >>> gradients, state = jnp.array([[3.0, 4], [4, 3]]), method.init(jnp.zeros(2))
      >>> for task in [0, 1, 0]:
      ...   updates = gradients * jax.nn.one_hot(task, 2)[:, None]
      ...   update, state = method.update(updates, state)
      ...   print(jnp.array_str(update, precision=3))
      [0. 0.]
      [1. 1.]
      [1. 1.]

    References:
      Liu et al, `ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks <https://arxiv.org/abs/2408.11104>`_, ICLR 2025

    .. note::
      The authors' code waits for every task, and for ever if one has no labels.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("b1", b1, "[0, 1)")
    arguments.check_range("b2", b2, "[0, 1)")
    arguments.check_range("eps", eps, "[0, inf)")

    def init(params):
        wide = jax.tree.map(
            lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)),
            base.zeros_like(params),
        )
        return MConFIGState(
            first=base.zeros_like(wide, num_tasks),
            counts=jnp.zeros(num_tasks, jnp.int32),
            direction=base.zeros_like(wide),
            second=base.zeros_like(wide),
            steps=jnp.zeros([], jnp.int32),
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        # Known before the moments are, which are then written in place, and once: of
        # gradients that can be squared, they are finite.
        finite = base.all_finite(tasks.squared_norms(updates))
        exists = tasks.has_gradient(updates) & finite
        average = lambda m, g: jnp.where(
            tasks.along_tasks(exists, m), b1 * m + (1 - b1) * g, m
        )
        first = jax.tree.map(average, state.first, updates)
        counts = state.counts + exists
        # No moves in the first round, nor where all tasks are absent.
        seen = counts > 0
        moves = (jnp.all(seen) | jnp.any(counts > 1)) & jnp.any(exists)

        bias = lambda decay, count: 1 - decay ** jnp.maximum(count, 1)
        factors = 1 / bias(b1, counts)
        unbiased = jnp.outer(factors, factors) * tasks.gram(first)
        weights = config_weights(unbiased, seen.astype(float))
        resolved = tasks.combine(weights * factors, first)
        steps = optax.safe_increment(state.steps)
        direction = jax.tree.map(lambda d: d * bias(b1, steps), resolved)

        def average_square(s, new, old):
            square = ((new - b1 * old) / (1 - b1)) ** 2
            return b2 * s + (1 - b2) * jnp.minimum(square, jnp.finfo(s.dtype).max)

        second = jax.tree.map(average_square, state.second, direction, state.direction)

        def step(d, s, g):
            out = jnp.where(moves, d / (jnp.sqrt(s / bias(b2, steps)) + eps), 0)
            return jnp.where(finite, out, jnp.nan).astype(g.dtype)

        kept = base.keep_if(
            moves,
            MConFIGState(first, counts, direction, second, steps),
            state._replace(first=first, counts=counts),
        )
        return jax.tree.map(step, resolved, second, updates), kept

    return base.from_coordinates(init, update)
