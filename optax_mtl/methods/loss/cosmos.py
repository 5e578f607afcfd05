"""Conditioned one-shot multi-objective search, its scalarization."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


@names.by_name("preference")
def cosmos(
    weight: jax.typing.ArrayLike = 1.0,
    *,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""COSMOS: losses weighed by a preference, and kept in its proportions.

    .. math::

      \min_\theta \; \sum_i r_i L_i
      - \lambda \, \frac{\langle r, L \rangle}{\|r\| \, \|L\|}

    The cosine rewards losses in the ratios of the preference, which spreads the
    solutions for different preferences along the Pareto front. The weights of the
    gradients, those of this objective, may be negative.

    Args:
      weight: :math:`\lambda` of the cosine, to be tuned to the size of the losses. At
        least 0.
      preference: :math:`r`, shape ``(T,)`` or a dict by name; by default ``1 / T`` for
        each task that is present.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, of any sign. A loss of exactly 0
      means an absent task.

    Raises:
      ValueError: for a negative ``weight`` or preference, or a preference of
        another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.cosmos(preference=[0.2, 0.8])
      >>> losses = jnp.array([3.0, 4.0])
      >>> update, _ = method.update(jnp.eye(2), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.262 0.753]

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep
      Multi-Objective Learning <https://arxiv.org/abs/2103.13392>`_, ICDM 2021

    .. note::
      The paper draws a new preference for each batch and feeds it to the model;
      :func:`optax.inject_hyperparams` changes it between steps.
    """
    arguments.check_range("weight", weight, "[0, inf)")
    preference = arguments.check_preference(preference)

    def weights_fn(losses):
        return cosmos_weights(
            losses, arguments.preference_of_losses(preference, losses), weight
        )

    return base.from_losses(weights_fn)


def cosmos_weights(
    losses: jax.Array, preference: jax.Array, weight: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    """Weights of :func:`cosmos`.

    Args:
      losses: shape ``(T,)``.
      preference: shape ``(T,)``, 0 for a task that is absent.
      weight: of the cosine.

    Returns:
      Array of shape ``(T,)``.
    """
    normalize = lambda x: x * base.reciprocal(jnp.linalg.norm(x))
    r, direction = normalize(preference), normalize(losses)
    cosine = jnp.sum(r * direction)
    slope = (r - cosine * direction) * base.reciprocal(jnp.linalg.norm(losses))
    return preference - weight * slope
