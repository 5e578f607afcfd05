"""Penalty-based boundary intersection."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


@names.by_name("preference", "reference")
def pbi(
    theta: jax.typing.ArrayLike = 5.0,
    *,
    preference: names.PerTask | None = None,
    reference: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalty-based boundary intersection (PBI): losses along a given ray.

    .. math::

      \min_\theta \; d_1 + \theta d_2, \quad
      d_1 = \frac{\langle L - z, r \rangle}{\|r\|}, \quad
      d_2 = \Big\| L - z - d_1 \frac{r}{\|r\|} \Big\|

    The first distance is how far the losses are along the ray of the preference
    :math:`r` from the ideal point :math:`z`, the second how far beside it. The
    weights of the gradients, those of this objective, may be negative.

    Args:
      theta: penalty :math:`\theta` of the distance from the ray. At least 0.
      preference: :math:`r`, shape ``(T,)`` or a dict by name; by default the same for
        each task.
      reference: :math:`z`, one number, shape ``(T,)`` or a dict by name.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, of any sign. A loss of exactly 0
      means an absent task.

    Raises:
      ValueError: for a negative ``theta`` or preference, or a preference of another
        length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.pbi(theta=0.5, preference=[0.6, 0.8])
      >>> losses = jnp.array([2.0, 1.0])
      >>> update, _ = method.update(jnp.eye(2), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [1.  0.5]

    References:
      Zhang and Li, `MOEA/D: A Multiobjective Evolutionary Algorithm Based on
      Decomposition <https://doi.org/10.1109/TEVC.2007.892759>`_, IEEE Transactions
      on Evolutionary Computation 2007
    """
    arguments.check_range("theta", theta, "[0, inf)")
    arguments.check_range("reference", reference, "(-inf, inf)")
    preference = arguments.check_preference(preference)

    def weights_fn(losses):
        r = arguments.preference_of_losses(preference, losses)
        z = arguments.for_each_task("reference", reference, len(losses), losses.dtype)
        gaps = jnp.where(losses != 0, losses - z, 0)
        return pbi_weights(gaps, r, theta)

    return base.from_losses(weights_fn)


def pbi_weights(
    gaps: jax.Array, preference: jax.Array, theta: jax.typing.ArrayLike = 5.0
) -> jax.Array:
    """Weights of :func:`pbi`.

    Args:
      gaps: losses minus those of the ideal point, shape ``(T,)``, 0 for a task that
        is absent.
      preference: shape ``(T,)``, 0 for a task that is absent.
      theta: penalty of the distance from the ray.

    Returns:
      Array of shape ``(T,)``.
    """
    ray = preference * base.reciprocal(jnp.linalg.norm(preference))
    beside = gaps - jnp.sum(gaps * ray) * ray
    distance = jnp.linalg.norm(beside)
    # On the ray, only rounding errors are beside it.
    noise = len(gaps) * jnp.finfo(gaps.dtype).eps * jnp.linalg.norm(gaps)
    away = jnp.where(distance > noise, distance, 0)
    return ray + theta * beside * base.reciprocal(away)
