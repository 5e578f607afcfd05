"""Task-aware adaptive learning rates."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, tasks
from optax_mtl.in_front import per_task


def adatask(
    num_tasks: int,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Task-aware adaptive learning rates (AdaTask): Adam for each task.

    With shared moments, a task with large gradients decides the learning rates of
    all. Here each task has its own:

    .. math::

      d = \sum_i \frac{\hat{m}_i}{\sqrt{\hat{v}_i} + \epsilon}

    Chain it with :func:`optax.scale_by_learning_rate`, not with another Adam.

    Args:
      num_tasks: number of tasks, T.
      b1: decay of the first moments. In [0, 1).
      b2: decay of the second moments. In [0, 1).
      eps: added to the denominator. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.adatask(num_tasks=2)
      >>> updates, state = jnp.array([[3.0, 1], [100, 50]]), method.init(jnp.zeros(2))
      >>> update, _ = method.update(updates, state)
      >>> print(jnp.array_str(update, precision=3))
      [2. 2.]

    References:
      Yang et al, `AdaTask: A Task-aware Adaptive Learning Rate Approach to
      Multi-task Learning <https://arxiv.org/abs/2211.15055>`_, AAAI 2023
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("b1", b1, "[0, 1)")
    arguments.check_range("b2", b2, "[0, 1)")
    arguments.check_range("eps", eps, "[0, inf)")
    adam = optax.with_extra_args_support(optax.scale_by_adam(b1, b2, eps))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        step = lambda updates, state: base.update_tasks(adam, updates, state, params)
        total = lambda x: coordinates.reduce(jnp.add, coordinates.each(jnp.array, x))
        out = jax.tree.map(total, step(updates, state)[0])
        # A gradient too large to be squared makes the moments infinite.
        squares = base.again(tasks.squared_norms, updates)
        finite = base.all_finite((squares, out))
        new_state = base.keep_if(finite, base.again(step, updates, state)[1], state)
        mark = lambda d, g: jnp.where(finite, d, jnp.nan).astype(g.dtype)
        return jax.tree.map(mark, out, updates), new_state

    return base.from_coordinates(per_task(adam, num_tasks).init, update_fn)
