"""Smooth Tchebycheff scalarization."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


@names.by_name("reference", "preference", "min_losses")
def stch(
    num_tasks: int,
    mu: jax.typing.ArrayLike = 1.0,
    *,
    objective: str = "log",
    reference: names.PerTask | None = None,
    preference: names.PerTask | None = None,
    warmup_steps: int = 100,
    window: int = 25,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Smooth Tchebycheff scalarization (STCH): a smooth maximum of the losses.

    With the objective ``"log"``, that of the authors' code for deep networks, or
    ``"linear"``, that of the paper:

    .. math::

      \min_\theta \; T \mu \log \sum_i \exp
      \frac{1}{\mu} \log \frac{L_i - b_i}{z_i - b_i}
      \qquad \text{or} \qquad
      \min_\theta \; \mu \log \sum_i \exp \frac{p_i (L_i - z_i)}{\mu}

    Args:
      num_tasks: number of tasks, T.
      mu: smoothness; as it vanishes, only the worst task counts. Positive.
      objective: ``"log"`` or ``"linear"``.
      reference: :math:`z`, one number, shape ``(T,)`` or a dict by name. For ``"log"``
        the nadir, losses that should be attained alike, by default measured: the method
        minimises :math:`\sum_i \log L_i` for ``warmup_steps + window`` steps and takes
        the average loss over the last ``window`` of them. For ``"linear"`` the ideal
        point, by default 0.
      preference: :math:`p`, shape ``(T,)`` or a dict by name, for ``"linear"`` alone;
        by default ``1 / T`` for each task that is present.
      warmup_steps: steps before the window. The authors' code takes four epochs. At
        least 0.
      window: steps to average over. The authors' code takes one epoch. At least 1.
      min_losses: :math:`b`, lower bounds of the losses for ``"log"``, one number, shape
        ``(T,)`` or a dict by name. Below its bound a loss has no logarithm, and the
        weights are NaN. ``"linear"`` needs none.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses`` for
      ``"log"``. A loss of exactly 0, or there at its bound, means an absent task.

    Raises:
      ValueError: for another objective, for a preference with ``"log"``, and for a
        negative preference, a ``mu`` or a ``window`` that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> nadir = jnp.array([1.0, 1.0, 2.0])
      >>> method = optax_mtl.stch(num_tasks=3, reference=nadir)
      >>> losses = jnp.array([2.0, 0.5, 1.0])
      >>> print(method.update(jnp.eye(3), method.init(None), losses=losses)[0])
      [1.  1.  0.5]

    References:
      Lin et al, `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024

    .. note::
      With ``objective="linear"``, a ``preference`` of ones and ``mu=1 / t`` it is
      tilted empirical risk minimization (`TERM <https://arxiv.org/abs/2007.01162>`_,
      ICLR 2021) with the tilt ``t``.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("mu", mu, "(0, inf)")
    arguments.check_choice("objective", objective, ("log", "linear"))
    arguments.check_range("reference", reference, "(-inf, inf)", optional=True)
    arguments.check_count("warmup_steps", warmup_steps, least=0)
    arguments.check_count("window", window)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    if objective == "log" and preference is not None:
        raise ValueError("a preference needs objective='linear'")
    preference = arguments.check_preference(preference)

    if objective == "linear":

        def step(state, losses):
            p = arguments.preference_of_losses(preference, losses)
            given = 0.0 if reference is None else reference
            z = arguments.for_each_task("reference", given, num_tasks, losses.dtype)
            return stch_linear_weights(losses, z, p, mu), state

        return base.from_state(optax.EmptyState, step, num_tasks, reads=["losses"])

    return base.with_reference(
        lambda losses, nadir: stch_weights(losses, nadir, mu),
        num_tasks,
        reference,
        warmup_steps,
        window,
        min_losses,
    )


def stch_weights(
    losses: jax.Array, nadir: jax.Array, mu: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    """Weights of :func:`stch` with the objective ``"log"`` and a known nadir."""
    exists = losses != 0
    ratios = jnp.log(jnp.where(exists, losses / nadir, 1))
    return exists.sum() * base.softmax(ratios / mu, exists) * base.reciprocal(losses)


def stch_linear_weights(
    losses: jax.Array,
    ideal: jax.typing.ArrayLike,
    preference: jax.Array,
    mu: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Weights of :func:`stch` with the objective ``"linear"``.

    Args:
      losses: shape ``(T,)``.
      ideal: losses that cannot be improved, one number or shape ``(T,)``.
      preference: shape ``(T,)``, 0 for a task that is absent.
      mu: smoothness.

    Returns:
      Array of shape ``(T,)``.
    """
    gaps = preference * (losses - ideal)
    return preference * base.softmax(gaps / mu, preference > 0)
