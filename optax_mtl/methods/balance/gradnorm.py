"""Gradient normalization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks

_MIN_WEIGHT = 1e-3


class GradNormState(NamedTuple):
    """State of :func:`gradnorm`."""

    weights: jax.Array  # Of the next step, shape `(T,)`, sum T.
    initial_losses: jax.Array  # First loss of each task, 0 before it, `(T,)`.
    optimizer: optax.OptState  # Of each weight.


@names.by_name("initial_losses", "min_losses")
def gradnorm(
    num_tasks: int,
    *,
    alpha: jax.typing.ArrayLike = 1.5,
    initial_losses: names.PerTask | None = None,
    optimizer: optax.GradientTransformation | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient normalization (GradNorm): all tasks train at similar rates.

    Learns weights for which the norms of the weighted gradients approach common
    targets, larger for tasks whose loss has fallen less:

    .. math::

      \min_w \sum_i \left| w_i \|g_i\| - \bar{n} \, r_i^\alpha \right|, \quad
      \bar{n} = \frac{1}{T} \sum_j w_j \|g_j\|, \quad
      r_i = \frac{L_i / L_i(0)}{\frac{1}{T} \sum_j L_j / L_j(0)},

    the targets held constant. Each step uses the weights before their update, as in
    the paper; they are then kept positive and renormalised to the sum T.

    Args:
      num_tasks: number of tasks, T.
      alpha: strength of the pull on tasks that train slowly; 0 makes all norms equal.
        At least 0.
      initial_losses: :math:`L_i(0)`, one number, shape ``(T,)`` or a dict by name, for
        losses that depend on the initial parameters; the paper names the logarithm of
        the number of classes. By default the first loss seen of each task.
      optimizer: of the weights, which it sees one by one; by default
        ``optax.adam(0.025, eps=1e-30)``, indifferent to the size of the gradients.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they and the initial ones are counted. Below its bound one
        makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates, losses = jnp.array([[2.0, 0], [0, 1]]), jnp.ones(2)
      >>> method = optax_mtl.gradnorm(num_tasks=2)
      >>> state = method.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...   update, state = method.update(updates, state, losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [1.95  1.025]

    References:
      Chen et al, `GradNorm: Gradient Normalization for Adaptive Loss Balancing in
      Deep Multitask Networks <https://arxiv.org/abs/1711.02257>`_, ICML 2018

    .. note::
      The paper takes the norms in one layer: hand the method the gradients of that
      layer alone with :func:`optax.partition`, or of all shared parameters. Weights
      are clipped at 0.001, since those of the paper may become negative. There is
      no official code; implementations differ in the parametrization of the
      weights and in what counts as the initial loss.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("alpha", alpha, "[0, inf)")
    arguments.check_range(
        "initial_losses", initial_losses, "(-inf, inf)", optional=True
    )
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    optimizer = arguments.as_transformation(
        "optimizer", optax.adam(0.025, eps=1e-30) if optimizer is None else optimizer
    )

    def init_fn():
        weights = jnp.ones(num_tasks)
        return GradNormState(
            weights=weights,
            initial_losses=jnp.zeros(num_tasks),
            optimizer=jax.vmap(optimizer.init)(weights),
        )

    def step(state, gram, losses):
        exists = tasks.present(gram) & (losses != 0)
        first = exists & (state.initial_losses == 0)
        at_first = losses
        if initial_losses is not None:
            given = arguments.for_each_task(
                "initial_losses", initial_losses, num_tasks
            ) - jnp.asarray(min_losses)
            at_first = jnp.where(given != 0, given, losses)
        initial = jnp.where(first, at_first, state.initial_losses)
        # Among the tasks that are present, the weights sum to their number.
        stored = jnp.where(exists, state.weights, 0)
        weights = stored * (exists.sum() * base.reciprocal(stored.sum()))

        rates = jnp.where(exists, losses * base.reciprocal(initial), 0)
        gradient = gradnorm_gradient(weights, jnp.diagonal(gram) ** 0.5, rates, alpha)
        new, opt_state = base.update_each(
            exists, optimizer, gradient, state.optimizer, weights
        )
        new = jnp.where(exists, jnp.maximum(new, _MIN_WEIGHT), 0)
        new = new * (stored.sum() * base.reciprocal(new.sum()))
        return weights, GradNormState(
            weights=jnp.where(exists, new, state.weights),
            initial_losses=initial,
            optimizer=opt_state,
        )

    return base.from_state(
        init_fn, step, num_tasks, reads=["gram", "losses"], min_losses=min_losses
    )


def gradnorm_gradient(
    weights: jax.Array,
    norms: jax.Array,
    rates: jax.Array,
    alpha: jax.typing.ArrayLike = 1.5,
) -> jax.Array:
    """Gradient of the objective of :func:`gradnorm` with respect to the weights.

    Args:
      weights: shape ``(T,)``, 0 for a task that is absent.
      norms: norms of the gradients before weighting, shape ``(T,)``.
      rates: losses relative to the initial ones, shape ``(T,)``.
      alpha: as in :func:`gradnorm`.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = weights > 0
    count = jnp.maximum(exists.sum(), 1)
    weighted = weights * norms
    relative = jnp.maximum(rates * count * base.reciprocal(jnp.sum(rates)), 0)
    targets = weighted.sum() / count * relative**alpha
    return jnp.where(exists, jnp.sign(weighted - targets) * norms, 0)
