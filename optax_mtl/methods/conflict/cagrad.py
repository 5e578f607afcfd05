"""Conflict-averse gradient descent."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers, tasks
from optax_mtl.precise import power_of_two


@names.by_name("preference")
def cagrad(
    c: jax.typing.ArrayLike = 0.4,
    *,
    preference: names.PerTask | None = None,
    rescale: bool = True,
    clip: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Conflict-averse gradient descent (CAGrad).

    Looks for the direction that helps the worst-off task most, within a ball
    around the average gradient :math:`g_0`:

    .. math::

      \max_d \; \min_i \langle g_i, d \rangle
      \quad \text{subject to} \quad \|d - g_0\| \le c \, \|g_0\|.

    With ``c=0`` this is the average gradient; as ``c`` grows, the direction
    approaches that of :func:`~optax_mtl.mgda`. If ``c >= 1`` no task gets worse,
    to first order, since :math:`d = 0` is then within the ball.

    Args:
      c: radius of the ball, relative to the norm of the average gradient. At least 0.
      preference: weights of the average :math:`g_0`, shape ``(T,)`` or a dict by name;
        by default ``1 / T`` for each task that is present.
      rescale: whether to divide the update by :math:`1 + c^2`, as the authors'
        code does and the paper does not.
      clip: whether the task gradients that move the average have no more than their
        share of it, the clipping of RACO: a task that the preference gives little
        weight does not come to dominate.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a negative ``c`` or preference, or a preference of another
        length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.cagrad(c=0.5, rescale=False)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(3)))
      >>> print(jnp.array_str(update, precision=3))
      [0.184 1.204 1.204]

    References:
      Liu et al, `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021; with ``clip`` CAGrad-Clip of
      `RACO <https://arxiv.org/abs/2602.02495>`_, ICML 2026, which does not rescale

    .. note::
      The authors' code further multiplies by T, to match the sum of the losses, and
      can divide by ``1 + c`` instead; chain with :func:`optax.scale` to do so. Other
      implementations return zero, or the average, for very small gradients.
    """
    arguments.check_range("c", c, "[0, inf)")
    arguments.check_choice("rescale", rescale, (True, False))
    arguments.check_choice("clip", clip, (True, False))
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        average = arguments.preference_among_present(
            preference, gram, default_total=1.0
        )
        weights = cagrad_weights(gram, c, average, clip)
        return weights / (1 + c**2) if rescale else weights

    return base.from_gram(weights_fn)


def cagrad_weights(
    gram: jax.Array,
    c: jax.typing.ArrayLike,
    average: jax.Array,
    clip: bool = False,
) -> jax.Array:
    """Weights of :func:`cagrad` without the rescaling.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      c: radius of the ball, relative to the norm of the average gradient.
      average: weights of the average gradient, shape ``(T,)``, 0 for tasks that
        are absent.
      clip: whether what moves the average is clipped to it.

    Returns:
      Array of shape ``(T,)``.
    """
    # Its squares are numbers, too; free of rounding errors, which a spread of norms
    # would not forgive.
    gram = gram / power_of_two(jnp.trace(gram))
    # The squared norm of a combination, and the rounding errors of the Gram matrix in
    # it. The ball takes them at their worst, so as not to be larger than allowed.
    norm2, noise = solvers.combined_norm2(gram, average)
    radius = c * jnp.sqrt(jnp.maximum(norm2 - noise, 0))
    # The dual problem: the direction is sought in the hull of the task gradients.
    exists = tasks.present(gram)
    hull = solvers.simplex_cone_program(gram, gram @ average, radius, exists)
    # If the hull contains the origin (Pareto stationary), no direction is better than
    # none, and if the average vanishes, there is no other one. A ball without the
    # origin, c < 1, is then one around a vanishing average, or c is 0.
    nothing = norm2 <= noise
    norm2, noise = solvers.combined_norm2(gram, hull)
    nothing |= norm2 <= len(gram) / 4 * noise
    if clip:
        hull = jnp.minimum(hull, average / jnp.where(exists.any(), average.sum(), 1))
        norm2, noise = solvers.combined_norm2(gram, hull)
        nothing |= norm2 <= noise
    length = jnp.sqrt(jnp.where(nothing, 1, norm2 + noise))
    at_best = average + radius / length * hull
    return jnp.where(nothing, jnp.where(jnp.less(c, 1), average, 0), at_best)
