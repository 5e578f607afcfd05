"""Coordinate-wise trimmed mean."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, tasks


def trimmed_mean(
    num_trimmed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trimmed mean: in each coordinate the average without the extreme tasks.

    .. math::

      d_p = \frac{1}{T - 2 b} \sum_{k = b + 1}^{T - b} g_{(k) p}, \quad
      g_{(1) p} \le \ldots \le g_{(T) p}

    Args:
      num_trimmed: :math:`b`, how many of the largest and of the smallest entries to
        leave out; T is at least :math:`2 b + 1`. By default 1, or 0 for two tasks and
        fewer. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a negative number and, at the first update, for one that is
        too large for the number of tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 5], [2, -90], [90, 6], [3, 7]])
      >>> method = optax_mtl.trimmed_mean(num_trimmed=1)
      >>> print(method.update(updates, method.init(jnp.zeros(2)))[0])
      [2.5 5.5]

    References:
      Yin et al, `Byzantine-Robust Distributed Learning: Towards Optimal Statistical
      Rates <https://arxiv.org/abs/1803.01498>`_, ICML 2018

    .. note::
      With absent tasks, T is the number of the others; if that is too small,
      as many entries are left out as can be.
    """
    arguments.check_count("num_trimmed", num_trimmed, least=0, optional=True)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        num_tasks = tasks.check_stacked(updates, params)
        if num_tasks is None:
            return updates, state
        if num_trimmed is not None and num_tasks < 2 * num_trimmed + 1:
            raise ValueError(
                f"trimmed_mean with num_trimmed={num_trimmed} needs at least"
                f" {2 * num_trimmed + 1} tasks, but there are {num_tasks}; lower"
                f" num_trimmed to at most {(num_tasks - 1) // 2}"
            )
        exists = tasks.has_gradient(updates)
        at_most = 1 if num_trimmed is None else num_trimmed
        trim = lambda x: _trimmed_mean(x, exists, at_most)
        return jax.tree.map(trim, updates), state

    return base.from_coordinates(optax.init_empty_state, update_fn)


def _trimmed_mean(x, exists, num_trimmed):
    count = exists.sum()
    trimmed = jnp.minimum(num_trimmed, jnp.maximum(count - 1, 0) // 2)
    rank = jnp.arange(len(x))
    inner = (rank >= trimmed) & (rank < count - trimmed)
    weights = inner / jnp.maximum(count - 2 * trimmed, 1)
    return coordinates.combine_in_order(weights, x, exists).astype(x.dtype)
