"""Unconflicting projection of gradients."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers


@names.by_name("preference")
def upgrad(
    *,
    preference: names.PerTask | None = None,
    reg_eps: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""UPGrad: each task gradient, made to conflict with none, averaged.

    .. math::

      d = \sum_i p_i \operatorname{proj}_C(g_i), \quad
      C = \{x : \langle g_j, x \rangle \ge 0 \text{ for all } j\}

    The result conflicts with no task, grows linearly with each gradient, and is
    zero where no direction improves all tasks.

    Args:
      preference: weights of the tasks, shape ``(T,)`` or a dict by name; by default ``1
        / T`` for each task that is present.
      reg_eps: added to the diagonal of the normalised Gram matrix, 1e-4 in the authors'
        code; by default the projections are exact. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a negative ``reg_eps`` or preference, or a preference of
        another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.upgrad()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.292 1.901 1.901]

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024

    .. note::
      The authors' code averages the gradients where they are small.
    """
    arguments.check_range("reg_eps", reg_eps, "[0, inf)")
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        shares = arguments.preference_among_present(preference, gram, default_total=1.0)
        return upgrad_weights(base.regularize(gram, reg_eps), shares)

    return base.from_gram(weights_fn)


def upgrad_weights(gram: jax.Array, preference: jax.Array) -> jax.Array:
    """Weights of :func:`upgrad`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: weights of the tasks, shape ``(T,)``, 0 for tasks that are absent.

    Returns:
      Array of shape ``(T,)``.
    """
    project = jax.vmap(lambda lower: solvers.dual_cone(gram, lower))
    # Row i: the projected gradient of task i, in terms of the gradients.
    return preference @ project(jnp.eye(len(gram), dtype=gram.dtype))
