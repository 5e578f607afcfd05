"""Loss discrepancy control."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


class LDCMTLState(NamedTuple):
    """State of :func:`ldc_mtl`."""

    logits: jax.Array  # Of the weights, shape `(T,)`.
    first_losses: jax.Array  # Of each task, 0 before, shape `(T,)`.
    optimizer_state: Any  # Of the inner optimizer, one for each task.


@names.by_name("min_losses", at_first=["initial"])
def ldc_mtl(
    num_tasks: int,
    *,
    penalty: jax.typing.ArrayLike = 0.01,
    transform: str = "none",
    initial: names.PerTask = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Loss discrepancy control (LDC-MTL): learned weights that bring losses together.

    The model and one number :math:`s_i` for each task, the logit of its weight
    :math:`w_i`, descend together on

    .. math::

      \frac{\sum_i w_i \ell_i}{W} + \lambda \sum_{i < T}
      |w_i \ell_i - w_{i + 1} \ell_{i + 1}|, \quad w_i = \frac{1}{1 + e^{-s_i}},

    where :math:`W = \sum_i w_i` counts as a constant: the weighted losses of tasks next
    to each other are to be equal. A large :math:`\lambda` makes the weight of the
    gradient of a small loss negative, so that this loss rises.

    Args:
      num_tasks: number of tasks, T.
      penalty: :math:`\lambda`; the authors have 0.01 to 0.1. At least 0.
      transform: what :math:`\ell` is: ``"none"``, the loss, or ``"log"``, the logarithm
        of the loss over its first value.
      initial: :math:`s` at first, one number, shape ``(T,)`` or a dict by name.
      optimizer: of the logits :math:`s`, which it sees one by one; by default
        ``optax.adam(1e-3)``.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task, and its neighbours are
      next to each other then.

    Raises:
      ValueError: for an unknown ``transform``, and for numbers out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.ldc_mtl(num_tasks=3, penalty=0.1)
      >>> losses = jnp.array([1.2, 0.4, 0.7])
      >>> update, _ = method.update(jnp.eye(3), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.406 0.187 0.406]

    References:
      Xiao et al, `LDC-MTL: Balancing Multi-Task Learning through Scalable Loss
      Discrepancy Control <https://arxiv.org/abs/2502.08585>`_, 2025

    .. note::
      The paper has a network of the features for the weights. The authors' code has it
      for two of its data sets; for the others it learns one number a task, as here, by
      the optimizer of the model: for CelebA as by default, for QM9 with ``"log"``,
      where it takes the first value anew in each epoch, and with logits that are kept
      at 0 or above and begin at random between 0.2 and 1.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("penalty", penalty, "[0, inf)")
    arguments.check_choice("transform", transform, ("none", "log"))
    arguments.check_range("initial", initial, "(-inf, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    inner = arguments.as_transformation(
        "optimizer", optax.adam(1e-3) if optimizer is None else optimizer
    )

    def init_fn():
        # In a buffer of its own, whoever holds the initial ones.
        logits = jnp.array(
            arguments.for_each_task("initial", initial, num_tasks, float)
        )
        return LDCMTLState(
            logits=logits,
            first_losses=jnp.zeros(num_tasks),
            optimizer_state=jax.vmap(inner.init)(logits),
        )

    def step(state, losses):
        exists = losses != 0
        first = jnp.where(state.first_losses == 0, losses, state.first_losses)
        values, slopes = losses, jnp.ones_like(losses)
        if transform == "log":
            values = jnp.log(jnp.where(exists, losses, 1) / jnp.where(exists, first, 1))
            slopes = base.reciprocal(losses)
        gradient, weights = jax.grad(discrepancy, argnums=(0, 1))(
            state.logits, values, exists, penalty
        )
        logits, optimizer_state = base.update_each(
            exists, inner, gradient, state.optimizer_state, state.logits
        )
        return weights * slopes, LDCMTLState(logits, first, optimizer_state)

    return base.from_state(
        init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses
    )


def discrepancy(
    logits: jax.Array,
    losses: jax.Array,
    exists: jax.Array,
    penalty: jax.typing.ArrayLike,
) -> jax.Array:
    """The objective of :func:`ldc_mtl`.

    Args:
      logits: of the weights, shape ``(T,)``.
      losses: shape ``(T,)``, of either sign.
      exists: tasks that are present, shape ``(T,)``.
      penalty: weight of the differences between neighbours.

    Returns:
      A scalar.
    """
    weights = jnp.where(exists, jax.nn.sigmoid(logits), 0)
    weighted = weights * losses
    mean = weighted.sum() * base.reciprocal(jax.lax.stop_gradient(weights.sum()))
    # Those that are present come first, in their order.
    order = jnp.argsort(~exists)
    steps = jnp.where(exists[order][1:], jnp.diff(weighted[order]), 0)
    # Where neighbours are equal, the slope of jnp.abs would not be 0.
    return mean + penalty * jnp.sum(steps * jax.lax.stop_gradient(jnp.sign(steps)))
