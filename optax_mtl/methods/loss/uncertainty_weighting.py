"""Weighting of losses by uncertainty."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, base, names

# Factors a and b of the objective a exp(-s) L + b s.
FORMS = {"regression": (0.5, 0.5), "classification": (1.0, 0.5), "tutorial": (1.0, 1.0)}


class UncertaintyWeightingState(NamedTuple):
    """State of :func:`uncertainty_weighting`."""

    log_variances: jax.Array  # One for each task, shape `(T,)`.
    optimizer_state: Any  # Of the inner optimizer, one for each task.


@names.by_name("form", "min_losses", at_first=["initial"])
def uncertainty_weighting(
    num_tasks: int,
    *,
    form: str | Sequence[str] | Mapping[str, str] = "regression",
    initial: names.PerTask = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Uncertainty weighting: losses divided by a learned variance.

    Learns a log-variance :math:`s_i` for each task along with the model, by descent
    on

    .. math::

      \sum_i a \, e^{-s_i} L_i + b \, s_i, \quad \text{hence} \quad
      d = \sum_i a \, e^{-s_i} g_i.

    At the optimum :math:`e^{s_i} = a L_i / b`: each weighted loss equals :math:`b`.

    Args:
      num_tasks: number of tasks, T.
      form: :math:`(a, b)`: ``"regression"`` (1/2, 1/2), the form of the paper for
        continuous targets; ``"classification"`` (1, 1/2), its form for categorical
        ones; ``"tutorial"`` (1, 1), which is :math:`L_i / \sigma_i^2 + \log
        \sigma_i^2`. One for all tasks, one for each, or a dict by name.
      initial: log-variances at first, one number, shape ``(T,)`` or a dict by name.
        Some implementations begin at -0.5.
      optimizer: for the log-variances; by default ``optax.adam(0.025)``.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which they are counted. Below its bound there is no optimum, and the
        weights are NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Raises:
      ValueError: for an unknown form, or a number of them other than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> method = optax_mtl.uncertainty_weighting(2, optimizer=optax.sgd(0.1))
      >>> updates, state = jnp.eye(2), method.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...   update, state = method.update(updates, state, losses=jnp.array([4.0, 1]))
      ...   print(jnp.array_str(update, precision=3))
      [0.5 0.5]
      [0.43 0.5 ]

    References:
      Kendall et al, `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
      Geometry and Semantics <https://arxiv.org/abs/1705.07115>`_, CVPR 2018

    .. note::
      The weights of a step are those before its update of the log-variances.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("initial", initial, "(-inf, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    forms = [form] * num_tasks if isinstance(form, str) else list(form)
    unknown = [f for f in forms if f not in FORMS]
    if unknown or len(forms) != num_tasks:
        raise ValueError(
            f"form is {form!r}; choose one of {', '.join(FORMS)}, for all tasks or for"
            f" each of the {num_tasks}"
        )
    a, b = np.array([FORMS[f] for f in forms]).T
    inner = arguments.as_transformation(
        "optimizer", optax.adam(0.025) if optimizer is None else optimizer
    )

    def init_fn():
        # In a buffer of its own, whoever holds the initial ones.
        log_variances = jnp.array(
            arguments.for_each_task("initial", initial, num_tasks, float)
        )
        return UncertaintyWeightingState(
            log_variances, jax.vmap(inner.init)(log_variances)
        )

    def step(state, losses):
        exists = losses != 0
        weights = jnp.where(exists, a * jnp.exp(-state.log_variances), 0)
        gradient = (b - weights * losses).astype(state.log_variances.dtype)
        return weights, UncertaintyWeightingState(
            *base.update_each(
                exists, inner, gradient, state.optimizer_state, state.log_variances
            )
        )

    return base.from_state(
        init_fn, step, num_tasks, reads=["losses"], min_losses=min_losses
    )
