"""Coordinate-wise median."""

import optax

from optax_mtl import tasks
from optax_mtl.methods.robust import trimmed_mean


def coordinate_median() -> optax.GradientTransformationExtraArgs:
    r"""Median of the tasks in each coordinate.

    .. math::

      d_p = \operatorname{median}_i \, g_{ip}

    Returns:
      A gradient transformation that aggregates stacked updates. Of an even number of
      tasks that are present, the two in the middle are averaged.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 5], [2, -90], [90, 6]])
      >>> method = optax_mtl.coordinate_median()
      >>> print(method.update(updates, method.init(jnp.zeros(2)))[0])
      [2. 5.]

    References:
      Yin et al, `Byzantine-Robust Distributed Learning: Towards Optimal Statistical
      Rates <https://arxiv.org/abs/1803.01498>`_, ICML 2018
    """

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        num_tasks = tasks.check_stacked(updates, params)
        if num_tasks is None:
            return updates, state
        # All but the middle is trimmed away.
        method = trimmed_mean.trimmed_mean((num_tasks - 1) // 2)
        return method.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
