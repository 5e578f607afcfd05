"""Multi-task learning as a bargaining game."""

import jax
import optax

from optax_mtl import arguments, base, names
from optax_mtl.methods.balance import fairgrad


@names.by_name("preference")
def nash_mtl(
    *,
    max_norm: jax.typing.ArrayLike | None = 1.0,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nash-MTL: the Nash bargaining solution between the tasks.

    The direction :math:`d` within a ball that maximises
    :math:`\sum_i p_i \log \langle g_i, d \rangle`. It is the combination with weights

    .. math::

      d = \sum_i a_i g_i, \quad \langle g_i, d \rangle = \frac{p_i}{a_i}, \quad a > 0,

    whatever the scale of each loss. All preferences :math:`p_i` being 1,
    :math:`\|d\|^2 = T`, so that with the default ``max_norm`` every update has
    length 1, that of the gradients being lost.

    Args:
      max_norm: the update is scaled down to this norm at most; ``None`` for no limit.
        Positive.
      preference: bargaining powers, shape ``(T,)`` or a dict by name; by default 1 for
        each task. A task with 0 takes no part.

    Returns:
      A gradient transformation that aggregates stacked updates. To solve for the
      weights in every k-th step only, wrap it:
      ``optax_mtl.update_every(optax_mtl.nash_mtl(), k, num_tasks)``.

    Raises:
      ValueError: for a ``max_norm`` that is not positive, and for a negative
        preference, or one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.nash_mtl()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.054 0.706 0.706]

    References:
      Navon et al, `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022

    .. note::
      The authors' code solves approximately, and falls back on the last weights, at
      first the plain sum, where its solver fails. Here the solution is exact. Where
      there is none, because a convex combination of the gradients vanishes, the
      update is zero. With a preference it is the inner problem of AuxiNash (`Auxiliary
      Learning as an Asymmetric Bargaining Game
      <https://arxiv.org/abs/2301.13501>`_, ICML 2023), which also learns it.
    """
    arguments.check_range("max_norm", max_norm, "(0, inf]", optional=True)
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        powers = arguments.preference_among_present(preference, gram)
        return nash_mtl_weights(gram, powers, max_norm)

    return base.from_gram(weights_fn)


def nash_mtl_weights(
    gram: jax.Array,
    preference: jax.Array,
    max_norm: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Weights of :func:`nash_mtl`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: bargaining powers, shape ``(T,)``, 0 for tasks that are absent.
      max_norm: largest norm of the combination; ``None`` for no limit.

    Returns:
      Array of shape ``(T,)``.
    """
    return fairgrad.fairgrad_weights(gram, preference, alpha=1.0, max_norm=max_norm)
