"""Gradient vaccine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, solvers, tasks
from optax_mtl.methods.conflict import pcgrad


class GradVacState(NamedTuple):
    """State of :func:`gradvac`."""

    key: jax.Array  # Data of the key for the orders of projection.
    targets: jax.Array  # Running cosines between the tasks, shape `(T, T)`.


def gradvac(
    num_tasks: int,
    beta: jax.typing.ArrayLike = 1e-2,
    *,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient vaccine (GradVac): PCGrad towards the usual similarity of two tasks.

    Where :func:`~optax_mtl.pcgrad` changes a gradient until its cosine
    :math:`\phi_{ij}` with another is no longer negative, this one aims at a running
    average :math:`\hat\phi_{ij}` of that cosine. For each task :math:`i`, visiting
    the others in random order, wherever :math:`\phi_{ij} < \hat\phi_{ij}`,

    .. math::

      g_i' \leftarrow g_i' + \frac{\|g_i'\| \left(
      \hat\phi_{ij} \sqrt{1 - \phi_{ij}^2} - \phi_{ij} \sqrt{1 - \hat\phi_{ij}^2}
      \right)}{\|g_j\| \sqrt{1 - \hat\phi_{ij}^2}} \, g_j, \quad
      \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi_{ij},

    and :math:`d = \sum_i g_i'`. The averages begin at 0, so that the first step is
    the one of PCGrad.

    Args:
      num_tasks: number of tasks, T.
      beta: rate at which the running averages forget. In [0, 1].
      key: seed or typed random key for the orders, drawn anew for each task and
        step.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> method = optax_mtl.gradvac(num_tasks=2, beta=0.5)
      >>> state = method.init(jnp.zeros(3))
      >>> for _ in range(2):
      ...   update, state = method.update(updates, state)
      ...   print(jnp.array_str(update, precision=3))
      [0.585 3.801 3.801]
      [1.007 3.264 3.264]

    References:
      Wang et al, `Gradient Vaccine: Investigating and Improving Multi-task
      Optimization in Massively Multilingual Models
      <https://arxiv.org/abs/2010.05874>`_, ICLR 2021

    .. note::
      Several implementations forget at ``beta=0.5``, and one updates an average
      only where it changed a gradient. The paper recommends averages for each
      layer, which :func:`~optax_mtl.per_group` keeps; here there is one for all
      parameters that the method is given.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("beta", beta, "[0, 1]")
    arguments.check_key(key)

    def init_fn():
        targets = jnp.zeros((num_tasks, num_tasks))
        return GradVacState(arguments.key_data(key), targets)

    def step(state, gram):
        next_key, order_key = jax.random.split(arguments.key_of(state.key, key))
        orders = pcgrad.random_orders(order_key, num_tasks)
        weights, targets = gradvac_weights(gram, state.targets, orders, beta)
        return weights, GradVacState(arguments.key_data(next_key), targets)

    return base.from_state(init_fn, step, num_tasks, reads=["gram"])


def gradvac_weights(
    gram: jax.Array,
    targets: jax.Array,
    orders: jax.Array,
    beta: jax.typing.ArrayLike = 1e-2,
) -> tuple[jax.Array, jax.Array]:
    """Weights of :func:`gradvac`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      targets: running cosines between the tasks, shape ``(T, T)``.
      orders: row i lists the tasks in the order in which task i visits them,
        shape ``(T, T)``; visiting itself has no effect.
      beta: rate at which the running cosines forget.

    Returns:
      The weights, shape ``(T,)``, and the next running cosines. Those of absent
      tasks stay as they are.
    """
    gram, _ = solvers.normalize_gram(gram)
    targets = targets.astype(gram.dtype)
    task = jnp.arange(len(gram))
    exists = tasks.present(gram)
    norms = jnp.sqrt(jnp.diagonal(gram))
    noise = len(gram) * jnp.finfo(gram.dtype).eps

    def visit(carry, others):
        # Row i expresses the changed g_i in the originals, and its inner products.
        coefficients, dots, targets = carry
        pairs = (others != task) & exists & exists[others]
        norm_squared = jnp.sum(coefficients * dots, axis=1)
        # A gradient that others have cancelled has no direction: its cosines are 0.
        terms = jnp.abs(coefficients) @ norms
        cancelled = norm_squared <= noise * terms**2
        norm = jnp.sqrt(jnp.where(cancelled, 0, norm_squared))
        scale = jnp.where(cancelled | ~pairs, 1, norm * norms[others])
        cosine = jnp.where(cancelled | ~pairs, 0, dots[task, others] / scale)
        cosine = jnp.clip(cosine, -1, 1)
        # The target of identical gradients, 1, would be reached nowhere else.
        old_target = targets[task, others]
        target = jnp.clip(old_target, -1 + 1e-6, 1 - 1e-6)
        sine = jnp.sqrt(1 - target**2)
        step = norm * (target * jnp.sqrt(1 - cosine**2) - cosine * sine)
        step = step / (jnp.where(pairs, norms[others], 1) * sine)
        step = jnp.where(pairs & (cosine < target), step, 0)
        moved = (1 - beta) * target + beta * cosine
        new_target = jnp.where(pairs, moved, old_target)
        return (
            coefficients.at[task, others].add(step),
            dots + step[:, None] * gram[others],
            targets.at[task, others].set(new_target),
        ), None

    start = (jnp.eye(len(gram), dtype=gram.dtype), gram, targets)
    (coefficients, _, targets), _ = jax.lax.scan(visit, start, orders.T)
    return coefficients.sum(axis=0), targets
