"""Multi-objective gradient correction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, averages, base, names, solvers, tasks
from optax_mtl.methods.conflict.modo import move_on_simplex, uniform


class MoCoState(NamedTuple):
    """State of :func:`moco` beside the tracked gradients."""

    steps: jax.Array  # Number of them, scalar.
    weights: jax.Array  # Shape `(T,)`, on the simplex.


@names.by_name("min_losses")
def moco(
    num_tasks: int,
    *,
    beta: jax.typing.ArrayLike = 0.5,
    gamma: jax.typing.ArrayLike = 0.1,
    rho: jax.typing.ArrayLike = 0.0,
    beta_sigma: jax.typing.ArrayLike = 0.5,
    gamma_sigma: jax.typing.ArrayLike = 0.5,
    normalize: str | None = None,
    lambda_map: str = "projection",
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multi-objective gradient correction (MoCo).

    Tracks the gradient of each task by an average over the steps, whose bias
    vanishes, and takes one step per update towards the weights of
    :func:`~optax_mtl.mgda` for the tracked gradients :math:`Y`:

    .. math::

      Y \leftarrow Y + \beta_k (G - Y), \quad
      \lambda \leftarrow \Pi_\Delta \big(
      \lambda - \gamma_k (Y Y^\top + \rho I) \lambda \big), \quad
      d = Y^\top \lambda

    with :math:`\beta_k = \beta k^{-\sigma_\beta}` and
    :math:`\gamma_k = \gamma k^{-\sigma_\gamma}`.

    Args:
      num_tasks: number of tasks, T.
      beta: step size of the tracking. In (0, 1].
      gamma: step size of the weights; the product with the squared norms of the
        gradients is what matters. At least 0.
      rho: strength of the pull towards equal weights. At least 0.
      beta_sigma: exponent of the decay of ``beta``. At least 0.
      gamma_sigma: exponent of the decay of ``gamma``. At least 0.
      normalize: ``None`` tracks the gradients, as in the paper; ``"loss"`` tracks
        :math:`L_i g_i / \|g_i\|` and needs losses, as LibMTL does.
      lambda_map: ``"projection"`` onto the simplex, as in the paper, or
        ``"softmax"``, as LibMTL does, which keeps the weights near equal.
      min_losses: lower bounds of the losses, one number, shape ``(T,)`` or a dict by
        name, from which ``normalize="loss"`` counts them. Below its bound one makes the
        update NaN.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for another ``normalize`` or ``lambda_map``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.moco(num_tasks=2)
      >>> updates, state = jnp.array([[2.0, 0], [0, 1]]), method.init(jnp.zeros(2))
      >>> update, _ = method.update(updates, state)
      >>> print(jnp.array_str(update, precision=4))
      [0.4812 0.2594]

    References:
      Fernando et al, `Mitigating Gradient Bias in Multi-objective Learning: A
      Provably Convergent Approach <https://arxiv.org/abs/2210.12624>`_, ICLR 2023

    .. note::
      The tracking starts at zero, so that the first update is the fraction ``beta``
      of its full length. The gradient of the simplex problem has a factor of 2 in the
      authors' first code: their step size of 0.1 is ``gamma=0.2`` here.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("beta", beta, "(0, 1]")
    arguments.check_range("gamma", gamma, "[0, inf)")
    arguments.check_range("rho", rho, "[0, inf)")
    arguments.check_range("beta_sigma", beta_sigma, "[0, inf)")
    arguments.check_range("gamma_sigma", gamma_sigma, "[0, inf)")
    arguments.check_choice("normalize", normalize, (None, "loss"))
    arguments.check_choice("lambda_map", lambda_map, ("projection", "softmax"))
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    to_simplex = base.softmax if lambda_map == "softmax" else solvers.project_simplex

    def init_fn():
        return MoCoState(jnp.zeros([], jnp.int32), uniform(num_tasks))

    def step(state, gram):
        exists = tasks.present(gram)
        size = gamma / (state.steps + 1.0) ** gamma_sigma
        move = lambda w: to_simplex(w - size * (gram @ w + rho * w), exists)
        weights, stored = move_on_simplex(state.weights, exists, move)
        return weights, MoCoState(optax.safe_increment(state.steps), stored)

    def scale_to_losses(squares, losses):
        """Gives each gradient the norm of its loss."""
        above = base.losses_above(tasks.stack_losses(losses, num_tasks), min_losses)
        return above * base.reciprocal(jnp.sqrt(squares))

    return averages.from_averages(
        init_fn,
        step,
        num_tasks,
        decay=lambda count: 1 - beta / count**beta_sigma,
        scale=None if normalize is None else scale_to_losses,
    )
