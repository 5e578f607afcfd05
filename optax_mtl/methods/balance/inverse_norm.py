"""Weights inversely proportional to the norms of the gradients."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers

_TARGETS = ("mean", "max", "harmonic")


def inverse_norm(
    target: str = "mean", *, power: jax.typing.ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradients of all tasks to the same norm, and sums them.

    .. math::

      d = \sum_i \left( \frac{c}{\|g_i\|} \right)^p g_i

    Args:
      target: the common norm :math:`c`: the ``"mean"`` of the norms, their
        ``"max"``, or their ``"harmonic"`` mean (of the powers), with which the weights
        sum to T.
      power: :math:`p`; 0 is the plain sum, and above 1 small gradients count more than
        large ones. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for another target and a negative power.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[3.0, 4.0], [0.0, 1.0]])
      >>> method = optax_mtl.inverse_norm()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [1.8 5.4]

    References:
      Lin et al, `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023, whose second half it is, with the
      target ``"max"``.

    .. note::
      There is no paper of its own; the same weights are part of several methods. In
      direction it is `NTKMTL <https://arxiv.org/abs/2510.18258>`_ (NeurIPS 2025) with
      one sample, whose powers of .5 and .75 are of the squared norms: 1 and 1.5 here.
      With :func:`~optax_mtl.smooth_weights` the ``"mean"`` is the balance of gradient
      norms in jaxpi (`Wang et al <https://arxiv.org/abs/2308.08468>`_, 2023).
    """
    arguments.check_choice("target", target, _TARGETS)
    arguments.check_range("power", power, "[0, inf)")
    return base.from_gram(lambda gram: inverse_norm_weights(gram, target, power))


def inverse_norm_weights(
    gram: jax.Array, target: str = "mean", power: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    """Weights of :func:`inverse_norm`, from the Gram matrix."""
    gram, _ = solvers.normalize_gram(gram)  # The weights do not depend on scale.
    norms = jnp.sqrt(jnp.diagonal(gram))
    count = jnp.maximum(jnp.sum(norms > 0), 1)
    common = norms.max() if target == "max" else norms.sum() / count
    ratios = jnp.where(norms > 0, common * base.reciprocal(norms), 1)
    weights = jnp.where(norms > 0, ratios**power, 0)
    if target == "harmonic":
        return count * base.reciprocal(weights.sum()) * weights
    return weights
