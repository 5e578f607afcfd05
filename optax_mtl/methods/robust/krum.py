"""Krum and multi-Krum."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers, tasks


def krum(
    num_byzantine: int | None = None,
    *,
    num_selected: int | None = None,
    squared: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Multi-Krum: the average of the gradients that have the nearest neighbours.

    Of T gradients, up to :math:`f` may be arbitrary. The score of a gradient sums
    the squared distances to its :math:`T - f - 2` nearest others, and those with the
    smallest scores are averaged:

    .. math::

      d = \frac{1}{m} \sum_{i \in S} g_i, \quad
      S = \text{the } m \text{ tasks with the smallest }
      \sum_{j \in N_i} \|g_i - g_j\|^2.

    Args:
      num_byzantine: :math:`f`, at most ``T - 3`` unless it is 0. By default 1, or 0 for
        three tasks and fewer. At least 0.
      num_selected: :math:`m`, at most T; 1 is Krum. By default ``T - f``. At least 1.
      squared: whether the score sums squared distances, as in the paper, or
        distances.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for numbers that are too small or, at the first update, too large
        for the number of tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array(
      ...     [[1.0, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]])
      >>> method = optax_mtl.krum(num_byzantine=1, num_selected=4)
      >>> print(method.update(updates, method.init(jnp.zeros(3)))[0])
      [1.25 0.75 1.5 ]

    References:
      Blanchard et al, `Machine Learning with Adversaries: Byzantine Tolerant
      Gradient Descent <https://arxiv.org/abs/1703.02757>`_, NeurIPS 2017

    .. note::
      Tasks that tie for the last place share it. With absent tasks, T is the number
      of the others; if that is too small, the score is the distance to the nearest.
    """
    arguments.check_count("num_byzantine", num_byzantine, least=0, optional=True)
    arguments.check_count("num_selected", num_selected, optional=True)
    arguments.check_choice("squared", squared, (True, False))

    def weights_fn(gram):
        return krum_weights(gram, num_byzantine, num_selected, squared)

    return base.from_gram(weights_fn)


def krum_weights(
    gram: jax.Array,
    num_byzantine: int | None = None,
    num_selected: int | None = None,
    squared: bool = True,
) -> jax.Array:
    """Weights of :func:`krum`, from the Gram matrix of the task gradients."""
    num_tasks = len(gram)
    if num_byzantine is not None and num_byzantine > max(num_tasks - 3, 0):
        raise ValueError(
            f"krum with num_byzantine={num_byzantine} needs at least"
            f" {num_byzantine + 3} tasks, but there are {num_tasks}; lower"
            " num_byzantine (0 for any number of tasks)"
        )
    if num_selected is not None and num_selected > num_tasks:
        raise ValueError(
            f"krum cannot select num_selected={num_selected} of {num_tasks} tasks;"
            f" lower it to at most {num_tasks}"
        )
    gram, _ = solvers.normalize_gram(gram)
    exists = tasks.present(gram)
    count = exists.sum()
    excluded = count > 3 if num_byzantine is None else num_byzantine
    squares = jnp.diagonal(gram)
    distances = jnp.maximum(jnp.add.outer(squares, squares) - 2 * gram, 0)
    distances = distances if squared else jnp.sqrt(distances)
    others = jnp.outer(exists, exists) & ~jnp.eye(num_tasks, dtype=bool)
    far = 4  # Squares that sum to 1 have no squared distance above 2.
    nearest = jnp.sort(jnp.where(others, distances, far), axis=1)
    neighbours = jnp.clip(count - excluded - 2, 1, jnp.maximum(count - 1, 1))
    scores = nearest @ (jnp.arange(num_tasks) < neighbours).astype(gram.dtype)
    scores = jnp.where(exists, scores, far * num_tasks)
    wanted = count - excluded if num_selected is None else num_selected
    selected = jnp.clip(wanted, 1, jnp.maximum(count, 1))
    # Rounding errors do not decide between equal scores.
    gap = scores - jnp.sort(scores)[selected - 1]
    noise = 16 * num_tasks * jnp.finfo(gram.dtype).eps
    first = exists & (gap < -noise)
    last = exists & (jnp.abs(gap) <= noise)
    share = (selected - first.sum()) / jnp.maximum(last.sum(), 1)
    return (first + last * share) / selected
