"""Improvable gap balancing."""

import jax
import optax

from optax_mtl import arguments, base, names


@names.by_name("reference", "min_losses")
def igb(
    num_tasks: int,
    *,
    reference: names.PerTask | None = None,
    warmup_steps: int = 0,
    window: int = 25,
    min_losses: names.PerTask = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Improvable gap balancing (IGBv1): more weight for losses that can still fall.

    .. math::

      d = \sum_i w_i \nabla \log (L_i - b_i), \quad
      w = T \operatorname{softmax}\left(\frac{L - b}{z - b}\right),

    where the fraction, the loss relative to an early one, stands for the gap between
    the loss and the smallest possible one, zero in the paper.

    Args:
      num_tasks: number of tasks, T.
      reference: :math:`z`, one number, shape ``(T,)`` or a dict by name, by default
        measured: the weights :math:`w` are 1 for ``warmup_steps + window`` steps, and
        the average loss over the last ``window`` of them is taken.
      warmup_steps: steps before the window. At least 0.
      window: steps to average over. The authors' code takes one epoch. At least 1.
      min_losses: :math:`b`, the smallest possible losses, one number, shape ``(T,)`` or
        a dict by name. Below its own one makes the weights NaN.

    Returns:
      A gradient transformation that aggregates stacked updates and reads the
      extra argument ``losses``, shape ``(T,)``, above ``min_losses``. A loss of
      exactly 0, or exactly at its bound, means an absent task.

    Raises:
      ValueError: for a window that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.igb(num_tasks=3, reference=jnp.array([2.0, 1.0, 1.0]))
      >>> losses = jnp.array([2.0, 0.5, 1.0])
      >>> update, _ = method.update(jnp.eye(3), method.init(None), losses=losses)
      >>> print(jnp.array_str(update, precision=3))
      [0.575 1.396 1.151]

    References:
      Dai et al, `Improvable Gap Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2307.15429>`_, UAI 2023

    .. note::
      The authors' code warms up for one epoch, and then averages for one. The second
      version of the paper, IGBv2, learns the weights by reinforcement learning, with a
      policy network of its own.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("reference", reference, "(-inf, inf)", optional=True)
    arguments.check_count("warmup_steps", warmup_steps, least=0)
    arguments.check_count("window", window)
    arguments.check_range("min_losses", min_losses, "(-inf, inf)")
    return base.with_reference(
        igb_weights, num_tasks, reference, warmup_steps, window, min_losses
    )


def igb_weights(losses: jax.Array, reference: jax.Array) -> jax.Array:
    """Weights of :func:`igb`, from the losses and early ones, shape ``(T,)``."""
    exists = losses != 0
    shares = base.softmax(losses / reference, exists)
    return exists.sum() * shares * base.reciprocal(losses)
