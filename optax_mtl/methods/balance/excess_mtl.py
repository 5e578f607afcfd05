"""Excess-risk weighting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, report, tasks


class ExcessMTLState(NamedTuple):
    """State of :func:`excess_mtl`."""

    squares: optax.Updates  # Sums of the squared gradients, float32, `(T, *p)`.
    logits: jax.Array  # Logarithms of the weights, largest 0, shape `(T,)`.
    counts: jax.Array  # Steps of each task, up to the warm-up, shape `(T,)`.
    initial: jax.Array  # Sum of the excess risks in the warm-up, shape `(T,)`.

    def __repr__(self):
        return report.describe_state(self)


def excess_mtl(
    num_tasks: int, *, eta: jax.typing.ArrayLike = 1e-2, warmup_steps: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Excess-risk weighting (ExcessMTL): more weight for tasks far from their optimum.

    Estimates the excess risk of a task, its loss minus the smallest possible one,
    with a diagonal approximation of the curvature, and raises the weights by it:

    .. math::

      E_i = g_i^\top \operatorname{diag}\Big(\sum_{s \le t} g_{i,s}^2\Big)^{-1/2} g_i,
      \quad w_i \leftarrow w_i \exp \frac{\eta \, E_i}{E_i(0)}, \quad
      \sum_i w_i = T

    Tasks whose labels are noisy, with a large loss that cannot fall, are not raised.

    Args:
      num_tasks: number of tasks, T.
      eta: step size of the weights. At least 0.
      warmup_steps: steps of equal weights, over which :math:`E_i(0)` is the average;
        at least 1. The paper takes those of three epochs.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: if there is no step to warm up.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.excess_mtl(num_tasks=2, eta=1.0)
      >>> state = method.init(jnp.zeros(2))
      >>> for scale in [1.0, 0.5]:  # The first task stops, the second goes on.
      ...   updates = jnp.array([[scale, 0.0], [0.0, 1.0]])
      ...   update, state = method.update(updates, state)
      >>> print(jnp.array_str(update, precision=3))
      [0.381 1.237]

    References:
      He et al, `Robust Multi-Task Learning with Excess Risks
      <https://arxiv.org/abs/2402.02009>`_, ICML 2024

    .. note::
      As in the authors' code, the weights sum to T, in the paper to 1, and the first
      step does not change them. The paper's curvature has no constant added, the
      code adds 1e-7 to the sums; here none, so that the scale of the gradients does
      not matter. Published settings of ``eta`` range from 0.01 to 1.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("eta", eta, "[0, inf)")
    arguments.check_count("warmup_steps", warmup_steps)

    def init(params):
        wide = jax.tree.map(
            lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)),
            base.zeros_like(params),
        )
        return ExcessMTLState(
            squares=base.zeros_like(wide, num_tasks),
            logits=jnp.zeros(num_tasks),
            counts=jnp.zeros(num_tasks, jnp.int32),
            initial=jnp.zeros(num_tasks),
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        square = lambda g, s: jnp.square(g.astype(s.dtype))
        add = lambda g, s: jax.tree.map(lambda g, s: s + square(g, s), g, s)
        squares = add(updates, state.squares)

        def excess_leaf(g, s):
            # A sum of squares of zero has seen nothing but zeros.
            risk = square(g, s) / jnp.sqrt(jnp.where(s > 0, s, 1))
            total, failed = coordinates.sum_and_any(risk, ~jnp.isfinite(s))
            return jnp.where(failed, jnp.nan, total)

        excess = tasks.sum_leaves(
            jax.tree.leaves(jax.tree.map(excess_leaf, updates, squares))
        )
        exists = excess > 0
        known = state.counts >= warmup_steps
        growth = eta * excess * warmup_steps * base.reciprocal(state.initial)
        logits = state.logits + jnp.where(exists & known, growth, 0)
        weights = excess_mtl_weights(logits, exists)
        weights = jnp.where(base.all_finite(excess), weights, jnp.nan)
        out = tasks.combine(weights, updates)
        new_state = ExcessMTLState(
            squares=base.again(add, updates, state.squares),
            logits=logits - logits.max(),
            counts=state.counts + (exists & ~known),
            initial=state.initial + jnp.where(known, 0, excess),
        )
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return base.from_coordinates(init, update)


def excess_mtl_weights(logits: jax.Array, exists: jax.Array) -> jax.Array:
    """Weights of :func:`excess_mtl`, which sum to the number of tasks present.

    Args:
      logits: logarithms of the weights, shape ``(T,)``.
      exists: tasks that are present, shape ``(T,)``.

    Returns:
      Array of shape ``(T,)``.
    """
    return exists.sum() * base.softmax(logits, exists)
