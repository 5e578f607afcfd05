"""Projection of the average gradient onto the dual cone."""

import jax
import optax

from optax_mtl import arguments, base, names, solvers


@names.by_name("preference")
def dualproj(
    *,
    preference: names.PerTask | None = None,
    reg_eps: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Dual projection: the nearest to the average gradient that conflicts with none.

    .. math::

      d = \operatorname*{argmin}_x \Big\| x - \sum_i p_i g_i \Big\|
      \quad \text{subject to} \quad \langle g_i, x \rangle \ge 0 \text{ for all } i

    This is the projection of gradient episodic memory (GEM), applied to tasks.

    Args:
      preference: weights of the tasks in the average, shape ``(T,)`` or a dict by name;
        by default ``1 / T`` for each task that is present.
      reg_eps: added to the diagonal of the normalised Gram matrix, 1e-4 in TorchJD; by
        default the projection is exact. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a negative ``reg_eps`` or preference, or a preference of
        another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.dualproj()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.556 1.111 1.111]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017

    .. note::
      TorchJD returns the average itself where the gradients are small.
    """
    arguments.check_range("reg_eps", reg_eps, "[0, inf)")
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        shares = arguments.preference_among_present(preference, gram, default_total=1.0)
        return dualproj_weights(base.regularize(gram, reg_eps), shares)

    return base.from_gram(weights_fn)


def dualproj_weights(gram: jax.Array, preference: jax.Array) -> jax.Array:
    """Weights of :func:`dualproj`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: weights of the average, shape ``(T,)``, 0 for absent tasks.

    Returns:
      Array of shape ``(T,)``.
    """
    return solvers.dual_cone(gram, preference)
