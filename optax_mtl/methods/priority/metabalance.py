"""MetaBalance: auxiliary gradients of about the size of the primary one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, report, tasks

# What the ratio of the norms is clipped to.
_STRATEGIES = {"both": (0, jnp.inf), "reduce": (0, 1), "enlarge": (1, jnp.inf)}


class MetaBalanceState(NamedTuple):
    """State of :func:`metabalance`."""

    counts: optax.Updates  # Gradients seen, shape `(num_tasks,)` for each tensor.
    norms: optax.Updates  # Moving averages of their norms, likewise.

    def __repr__(self):
        return report.describe_state(self)


@names.by_name(of_tasks=["primary"])
def metabalance(
    num_tasks: int,
    *,
    relax: jax.typing.ArrayLike = 0.7,
    decay: jax.typing.ArrayLike = 0.9,
    primary: names.Task = 0,
    strategy: str = "both",
) -> optax.GradientTransformationExtraArgs:
    r"""Brings the auxiliary gradients close to the primary one in magnitude.

    For each parameter tensor, with the moving averages :math:`N_i` of the norms of
    its gradients,

    .. math::

      d = \sum_i \left(r \frac{N_p}{N_i} + 1 - r\right) g_i.

    Args:
      num_tasks: number of tasks, T.
      relax: :math:`r`; 1 makes the norms equal, and 0 gives the plain sum. In [0, 1].
      decay: of the moving averages of the norms. In [0, 1).
      primary: number or name of the primary task, :math:`p`.
      strategy: whether to ``"reduce"`` only gradients larger than the primary one,
        to ``"enlarge"`` only smaller ones, or ``"both"``, as the authors' code does.

    Returns:
      A gradient transformation that aggregates stacked updates. A tensor that the
      primary task has no gradient for gets the plain sum.

    Raises:
      ValueError: for an unknown ``strategy``, or a task that does not exist.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[3.0, 4], [0, 50]])
      >>> method = optax_mtl.metabalance(num_tasks=2, relax=1.0)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [3. 9.]

    References:
      He et al, `MetaBalance: Improving Multi-Task Recommendations via Adapting
      Gradient Magnitudes of Auxiliary Tasks <https://arxiv.org/abs/2203.06801>`_,
      WWW 2022
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("relax", relax, "[0, 1]")
    arguments.check_range("decay", decay, "[0, 1)")
    arguments.check_primary(primary, num_tasks)
    arguments.check_choice("strategy", strategy, _STRATEGIES)

    def init_fn(params):
        return MetaBalanceState(
            counts=jax.tree.map(lambda _: jnp.zeros(num_tasks, jnp.int32), params),
            norms=jax.tree.map(lambda _: jnp.zeros(num_tasks, float), params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        now = jax.tree.map(lambda g: jnp.sqrt(jnp.diagonal(tasks.gram(g))), updates)
        counts = jax.tree.map(lambda c, n: c + (n > 0), state.counts, now)
        norms = jax.tree.map(
            lambda old, n: jnp.where(n == 0, old, decay * old + (1 - decay) * n),
            state.norms,
            now,
        )

        def resolve(g, count, norm):
            # The bias cancels unless a task was absent in some of the steps.
            norm = norm / (1 - decay ** jnp.maximum(count, 1))
            known = (count > 0) & (count[primary] > 0)
            ratio = jnp.where(known, norm[primary] / jnp.where(known, norm, 1), 1)
            ratio = jnp.clip(ratio, *_STRATEGIES[strategy])
            weights = (ratio - 1) * relax + 1
            # Of infinite norms ratios can be finite.
            return tasks.combine(jnp.where(finite, weights, jnp.nan), g)

        finite = base.all_finite(now)
        out = jax.tree.map(resolve, updates, counts, norms)
        new_state = MetaBalanceState(counts, norms)
        return out, base.keep_if(base.all_finite(out), new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
