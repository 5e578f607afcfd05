"""Group optimization for multi-task alignment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


class GO4AlignState(NamedTuple):
    """State of :func:`go4align`."""

    scores: jax.Array  # Minus the sums of the losses times the step size, `(T,)`.


@names.by_name("min_losses")
def go4align(
    num_tasks: int,
    *,
    num_groups: int = 2,
    step_size: jax.typing.ArrayLike = 1e-4,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Group optimization for multi-task alignment (GO4Align).

    Groups tasks of similar weights, and gives the mean weight to all of a group:

    .. math::

      q_i \leftarrow q_i \exp(-\eta L_i) / Z, \quad
      v_i = q_i \frac{\sum_j L_j}{L_i}, \quad
      w_i = \frac{1}{|G(i)|} \sum_{j \in G(i)} v_j,

    where the groups :math:`G` minimise the squares of :math:`v_i - w_i`. In one
    dimension they are stretches of the sorted numbers, and found exactly.

    Args:
      num_tasks: number of tasks, T.
      num_groups: number of groups, K. At least 1.
      step_size: :math:`\eta`. At least 0.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Raises:
      ValueError: for numbers out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.go4align(num_tasks=3, num_groups=2, step_size=0.0)
      >>> losses = jnp.array([1.2, 0.4, 0.7])
      >>> update, _ = method.update(jnp.eye(3), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.867 1.917 0.867]

    References:
      Shen et al, `GO4Align: Group Optimization for Multi-Task Alignment
      <https://arxiv.org/abs/2404.06486>`_, NeurIPS 2024

    .. note::
      The authors' code groups by k-means from a random start, which may miss the best
      groups.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_count("num_groups", num_groups)
    arguments.check_range("step_size", step_size, "[0, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")

    def step(state, losses):
        scores = state.scores - step_size * losses
        return go4align_weights(losses, scores, num_groups), GO4AlignState(scores)

    return base.from_state(
        lambda: GO4AlignState(jnp.zeros(num_tasks)),
        step,
        num_tasks,
        reads=["losses"],
        min_losses=min_losses,
    )


def go4align_weights(
    losses: jax.Array, scores: jax.Array, num_groups: int = 2
) -> jax.Array:
    """Weights of :func:`go4align`.

    Args:
      losses: shape ``(T,)``, 0 for a task that is absent.
      scores: the logarithm of :math:`q`, up to a constant, shape ``(T,)``.
      num_groups: number of groups.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = losses != 0
    shares = base.softmax(scores, exists)
    return mean_of_group(
        shares * losses.sum() * base.reciprocal(losses), exists, num_groups
    )


def mean_of_group(values: jax.Array, exists: jax.Array, num_groups: int) -> jax.Array:
    """Each value's mean over its group, groups being those of least squares.

    Args:
      values: shape ``(T,)``.
      exists: which of them count, shape ``(T,)``; the others become 0.
      num_groups: number of groups, some of which may be empty.

    Returns:
      Array of shape ``(T,)``.
    """
    order = jnp.argsort(values)
    count = exists[order].astype(values.dtype)
    mean = jnp.sum(values * exists) * base.reciprocal(count.sum())
    x = (values[order] - mean) * count  # Centred: sums of squares lose no digits.

    # Of the stretch from i to j, both included: sizes, sums, and squared deviations.
    first, last = jnp.indices((len(x), len(x)))
    upto = lambda y: jnp.cumsum(y)[last] - (jnp.cumsum(y) - y)[first]
    size, total = upto(count), upto(x)
    cost = upto(x**2) - total**2 * base.reciprocal(size)
    never = 2 * jnp.sum(x**2)  # More than any grouping costs.
    cost = jnp.where(first <= last, cost, never)

    def add_group(best, _):
        """Least cost of what ends at j, with one group more, and where that starts."""
        before = jnp.concatenate([jnp.zeros(1, best.dtype), best[:-1]])
        options = before[:, None] + cost
        return options.min(axis=0), options.argmin(axis=0)

    nothing = jnp.full(len(x), never)
    _, starts = jax.lax.scan(add_group, nothing, length=num_groups)

    def mark(end, starts):
        """Mean of the group that ends there, at its places; where the next one ends."""
        start, places = starts[end], jnp.arange(len(x))
        group = total[start, end] * base.reciprocal(size[start, end])
        inside = (places >= start) & (places <= end)  # None where the end is -1.
        return jnp.where(end < 0, -1, start - 1), jnp.where(inside, group, 0)

    _, groups = jax.lax.scan(mark, len(x) - 1, starts, reverse=True)
    means = jnp.zeros_like(values).at[order].set(mean + groups.sum(axis=0))
    return jnp.where(exists, means, 0)
