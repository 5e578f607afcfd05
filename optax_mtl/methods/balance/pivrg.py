"""Performance-informed variance reduction of gradients."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks
from optax_mtl.methods.balance.fairgrad import fairgrad_weights


@names.by_name("scores")
def pivrg(
    scores: names.PerTask = 0.0,
    *,
    bound: jax.typing.ArrayLike = 2.0,
    min_temperature: jax.typing.ArrayLike = 10.0,
    max_norm: jax.typing.ArrayLike | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""PIVRG: fair shares of the progress, larger where validation is worse.

    .. math::

      d = \sum_i a_i g_i, \quad \langle g_i, d \rangle = \sqrt{w_i / a_i}, \quad
      w = T \operatorname{softmax}(s / \tau), \quad
      \tau = \max\left(\frac{\max s - \min s}{\ln b}, \tau_0\right).

    This is :func:`~optax_mtl.fairgrad` with ``alpha=2``, whose preference
    :math:`\sqrt{w}` follows the scores: of two weights :math:`w` one is at most
    :math:`b` times the other.

    Args:
      scores: :math:`s`, by how many per cent each task is worse, on validation data,
        than a model for it alone: one number, shape ``(T,)`` or a dict by name. Those
        of the last validation are the extra argument ``scores`` of ``update``, or come
        by :func:`optax.inject_hyperparams`.
      bound: :math:`b`, largest ratio of two weights. Above 1.
      min_temperature: :math:`\tau_0`, in the unit of the scores: below a spread of
        :math:`\tau_0 \ln b` the weights come closer to each other. Positive.
      max_norm: the update is scaled down to this norm at most; ``None`` for no limit.
        Positive.

    Returns:
      A gradient transformation that aggregates stacked updates and takes the extra
      argument ``scores``, shape ``(T,)`` or a dict of scalars, in the place of those
      that it was made with.

    Raises:
      ValueError: for numbers out of range, or a number of scores other than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.pivrg(max_norm=None)
      >>> state = method.init(jnp.zeros(3))
      >>> scores = jnp.array([15.0, -2.0])
      >>> update, _ = method.update(updates, state, scores=scores)
      >>> print(jnp.array_str(updates @ update, precision=3))
      [1.671 1.455]

    References:
      Qin et al, `Revisiting Fairness in Multitask Learning: A Performance-Driven
      Approach for Variance Reduction
      <https://openaccess.thecvf.com/content/CVPR2025/papers/Qin_Revisiting_Fairness_in_Multitask_Learning_A_Performance-Driven_Approach_for_Variance_CVPR_2025_paper.pdf>`_,
      CVPR 2025

    .. note::
      Defaults are those of the authors' class; their experiments have a ``bound`` from
      1.8 on and temperatures up to 100. Their code multiplies by T before it limits the
      norm, and has no solution where a convex combination of the gradients vanishes;
      here the update is zero then.
    """
    arguments.check_range("scores", scores, "(-inf, inf)")
    arguments.check_range("bound", bound, "(1, inf)")
    arguments.check_range("min_temperature", min_temperature, "(0, inf)")
    arguments.check_range("max_norm", max_norm, "(0, inf]", optional=True)
    given = scores

    def update_fn(updates, state, params=None, *, scores=None, **extra_args):
        tasks.check_same_names(extra_args.get("losses"), scores, "scores")

        def weights_fn(gram):
            if scores is None:
                latest = arguments.for_each_task("scores", given, len(gram), gram.dtype)
            else:
                latest = tasks.stack_losses(scores, len(gram), "scores")
            return pivrg_weights(gram, latest, bound, min_temperature, max_norm)

        return base.from_gram(weights_fn).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def pivrg_weights(
    gram: jax.Array,
    scores: jax.Array,
    bound: jax.typing.ArrayLike = 2.0,
    min_temperature: jax.typing.ArrayLike = 10.0,
    max_norm: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Weights of :func:`pivrg`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      scores: how much worse each task is, shape ``(T,)``.
      bound: largest ratio of two weights of the tasks.
      min_temperature: in the unit of the scores.
      max_norm: largest norm of the combination; ``None`` for no limit.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = tasks.present(gram)
    lowest = jnp.min(jnp.where(exists, scores, jnp.finfo(scores.dtype).max))
    above = jnp.where(exists, scores - lowest, 0)
    temperature = jnp.maximum(jnp.max(above) / jnp.log(bound), min_temperature)
    shares = exists.sum() * base.softmax(above / temperature, exists)
    return fairgrad_weights(gram, jnp.sqrt(shares), 2.0, max_norm)
