"""Multiple-gradient descent."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers, tasks

NORMALIZATIONS = ("none", "l2", "loss", "loss+")


@names.by_name("preference", "min_losses")
def mgda(
    normalization: str = "none",
    *,
    apply_to: str = "normalized",
    preference: names.PerTask | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiple-gradient descent algorithm (MGDA): the shortest convex combination.

    .. math::

      d = \sum_i w_i g_i, \quad w = \operatorname*{argmin}_{w \ge 0, \sum_i w_i = 1}
      \Big\| \sum_i w_i g_i \Big\|^2

    The result conflicts with no task, :math:`\langle g_i, d \rangle \ge \|d\|^2`,
    and is zero where no direction improves all of them. Since the shortest
    combination looks like the shortest gradients, they may be normalised first, to
    :math:`g_i / s_i`.

    Args:
      normalization: the divisors :math:`s_i`: ``"none"`` (1), ``"l2"`` (the norm of
        the gradient), ``"loss"`` (the loss) or ``"loss+"`` (their product).
      apply_to: what the weights multiply: the ``"normalized"`` gradients, for which
        no conflict is promised, or the ``"raw"`` ones, as in Sener and Koltun's code.
      preference: factors of the normalised gradients, shape ``(T,)`` or a dict by name.
        A task with a larger one counts as having longer gradients, and gets less
        weight; one with 0 takes no part.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which a normalisation counts them. Below its bound one makes the
        weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates. With a
      normalisation by losses it reads the extra argument ``losses``, shape
      ``(T,)``, above ``min_losses``; a loss of exactly 0, or exactly at its bound,
      then means an absent task.

    Raises:
      ValueError: for an unknown ``normalization`` or ``apply_to``, and for a
        negative preference, or one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> method = optax_mtl.mgda()
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [0.8 0.4]

    References:
      Désidéri, `Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization <https://doi.org/10.1016/j.crma.2012.03.014>`_, C. R. Math. 2012

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018

    .. note::
      The weights are exact. Several implementations stop early or at weights of
      0.999, and may be far from the shortest combination for more than two tasks.
      The absent tasks are left out; by the letter, they would make the result zero.
    """
    arguments.check_choice("normalization", normalization, NORMALIZATIONS)
    arguments.check_choice("apply_to", apply_to, ("normalized", "raw"))
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    preference = arguments.check_preference(preference)
    by_loss = normalization.startswith("loss")

    def step(state, gram, losses=None):
        factors = arguments.preference_among_present(preference, gram)
        if normalization in ("l2", "loss+"):
            norms = jnp.sqrt(jnp.diagonal(gram))
            factors = factors / jnp.where(norms > 0, norms, 1)
        if by_loss:
            factors = factors * base.reciprocal(losses)
        weights = mgda_weights(gram, factors)
        return weights * factors if apply_to == "normalized" else weights, state

    reads = ["gram", "losses"] if by_loss else ["gram"]
    return base.from_state(optax.EmptyState, step, reads=reads, min_losses=min_losses)


def mgda_weights(gram: jax.Array, factors: jax.Array | None = None) -> jax.Array:
    """Weights of :func:`mgda` for the gradients times factors.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      factors: what each gradient is multiplied by, shape ``(T,)``; by default 1. A
        task with 0 takes no part.

    Returns:
      Array of shape ``(T,)``, which sums to 1.
    """
    if factors is not None:
        gram = gram * jnp.outer(factors, factors)
    return solvers.simplex_qp(gram, mask=tasks.present(gram))
