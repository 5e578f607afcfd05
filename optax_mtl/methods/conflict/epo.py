"""Exact Pareto optimal search."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, solvers, tasks


@names.by_name("preference", "min_losses")
def epo(
    *,
    preference: names.PerTask | None = None,
    tolerance: jax.typing.ArrayLike = 1e-4,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Exact Pareto optimal search (EPO): the point of the front on a given ray.

    Looks for losses with :math:`r_1 L_1 = \ldots = r_T L_T`. Far from them it balances:
    it follows :math:`a = r \, (\log T \hat L - \mu)`, where :math:`\hat L_i = r_i L_i /
    \sum_j r_j L_j` and :math:`\mu = \sum_i \hat L_i \log T \hat L_i` says how far,

    .. math::

      \max_{w \in \Delta} \; a^\top G w \quad \text{subject to} \quad (G w)_j \ge 0
      \text{ for the largest } r_j L_j, \;
      (G w)_j \ge (G a)_j \text{ where } (G a)_j \le 0.

    Without a positive :math:`(G a)_j`, all are to have :math:`(G w)_j \ge 0`. Where
    :math:`\mu \le \epsilon` it descends for all tasks, and stays on the ray:

    .. math::

      \max_{w \in \Delta} \; \sum_j (G w)_j \quad \text{subject to} \quad G w \ge 0, \;
      a^\top G w \ge \min(0, v),

    where :math:`v` is the best that is possible. These are linear programs in T
    variables (:func:`~optax_mtl.solvers.simplex_lp`), whose solutions are vertices: the
    weights jump from step to step, and many are 0.

    Args:
      preference: :math:`r`, shape ``(T,)`` or a dict by name; by default equal. A task
        with a larger one gets a smaller loss. Its scale counts in the constraints.
      tolerance: :math:`\epsilon`, how far from the ray is on it. At least 0.
      min_losses: lower bounds, from which the losses are counted, one number, shape
        ``(T,)`` or a dict by name. Below its bound a loss makes the update NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the extra
      argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of exactly 0,
      or exactly at its bound, means an absent task.

    Raises:
      ValueError: for a negative preference, or one of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.epo(preference=[1.0, 2.0])
      >>> updates, state = jnp.array([[2.0, 0], [-1, 1]]), method.init(None)
      >>> for losses in jnp.array([[4.0, 1.0], [2.0, 1.0]]):  # Beside the ray, on it.
      ...   update, state = method.update(updates, state, losses=losses)
      ...   print(jnp.array_str(update, precision=3))
      [2. 0.]
      [0.5 0.5]

    References:
      Mahapatra and Rajan, `Multi-Task Learning with User Preferences: Gradient Descent
      with Controlled Ascent in Pareto Optimization
      <https://proceedings.mlr.press/v119/mahapatra20a.html>`_, ICML 2020

    .. note::
      The authors ask for :math:`a^\top G w \ge \min(0, \max_j (G a)_j)` on the ray, and
      where no weights meet that, they fall back on fixed ones.
    """
    preference = arguments.check_preference(preference)
    arguments.check_range("tolerance", tolerance, "[0, inf)")
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")

    def step(state, gram, losses):
        exists = tasks.present(gram) & (losses != 0)
        r = arguments.preference_where(preference, exists.astype(gram.dtype))
        gram = jnp.where(jnp.outer(exists, exists), gram, 0)
        return epo_weights(gram, losses, r, tolerance), state

    return base.from_state(
        optax.EmptyState, step, reads=["gram", "losses"], min_losses=min_losses
    )


def epo_weights(
    gram: jax.Array,
    losses: jax.Array,
    preference: jax.Array,
    tolerance: jax.typing.ArrayLike = 1e-4,
) -> jax.Array:
    """Weights of :func:`epo`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``, 0 for an absent task.
      losses: at least 0, shape ``(T,)``.
      preference: shape ``(T,)``, 0 for an absent task.
      tolerance: as in :func:`epo`.

    Returns:
      Array of shape ``(T,)``.
    """
    gram, _ = solvers.normalize_gram(gram)
    exists = tasks.present(gram)
    scaled = losses * base.reciprocal(losses.max()) * preference
    shares = scaled * base.reciprocal(scaled.sum())
    logs = jnp.log(jnp.where(shares > 0, shares * exists.sum(), 1))
    distance = jnp.sum(shares * logs)
    towards = gram @ (preference * (logs - distance))
    balances = distance > tolerance

    helped = towards > 0
    most = scaled == scaled.max()
    all_fall = ~balances | ~jnp.any(helped)
    constrained = all_fall | most | ~helped
    bounds = jnp.where(all_fall | most, 0, jnp.minimum(towards, 0))
    rows = jnp.where(constrained[:, None], gram, 0)

    def solve(number, weights):
        second = number > 0  # On the ray, with what was possible.
        objective = jnp.where(second, gram.sum(axis=0), towards)
        stays = jnp.where(second, towards, 0)
        kept = jnp.where(second, jnp.minimum(weights @ towards, 0), 0)
        A = jnp.concatenate([rows, stays[None]])
        return solvers.simplex_lp(objective, A, jnp.append(bounds, kept), exists)

    # One program in a loop is compiled once.
    return jax.lax.fori_loop(0, jnp.where(balances, 1, 2), solve, 0 * shares)
