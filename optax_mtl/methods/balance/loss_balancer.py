"""The loss balancer of EnCodec."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names, tasks


class LossBalancerState(NamedTuple):
    """State of :func:`loss_balancer`."""

    totals: jax.Array  # Of the weights in the averages, shape `(num_tasks,)`.
    norms: jax.Array  # Moving averages of the norms, unbiased, `(num_tasks,)`.


@names.by_name("preference")
def loss_balancer(
    num_tasks: int,
    *,
    preference: names.PerTask | None = None,
    norm: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.999,
    per_example: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each task its share of the gradient, whatever the size of its loss.

    .. math::

      d = R \sum_i \frac{p_i}{\sum_j p_j} \frac{g_i}{N_i},

    where :math:`N_i` is the moving average of the norm :math:`\|g_i\|`, corrected for
    its start from 0. In EnCodec and AudioCraft the gradients are those at the output
    of the model, where all losses meet: :func:`~optax_mtl.value_and_grad_at_features`.

    Args:
      num_tasks: number of tasks, T.
      preference: :math:`p`, shape ``(T,)`` or a dict by name; by default equal. The
        shares are those among the tasks that are present.
      norm: :math:`R`, how long the sum of the shares is. Positive.
      decay: of the moving averages of the norms. In [0, 1).
      per_example: whether :math:`N_i` is the average over the examples of the norm of
        each, and the leading axis of the parameters, which are features then, that of
        the examples. The default is the norm of all.

    Returns:
      A gradient transformation that aggregates stacked updates. With ``per_example``
      it reads the gradients themselves, otherwise the Gram matrix.

    Raises:
      ValueError: for a negative preference, or one of another length than T; with
        ``per_example``, for parameters without an axis or with different ones.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> model = lambda params, x: x * params
      >>> def losses_fn(params, output, x):
      ...   return {"wave": jnp.sum(jnp.abs(output - x)), "mel": jnp.sum(output**2)}
      >>> method = optax_mtl.loss_balancer(2, preference={"wave": 1.0, "mel": 3.0})
      >>> resolve = optax_mtl.value_and_grad_at_features(model, losses_fn, method)
      >>> params, x = jnp.array([3.0, 3.0]), jnp.array([2.0, 1.0])
      >>> losses, grads, state = resolve(params, resolve.init(params, x), x)
      >>> print(jnp.array_str(grads, precision=3))
      [1.695 0.512]

    References:
      Défossez et al, `High Fidelity Neural Audio Compression
      <https://arxiv.org/abs/2210.13438>`_, TMLR 2023

    .. note::
      The authors' code has ``per_example=True``, and adds 1e-12 to the averages.
    """
    arguments.check_count("num_tasks", num_tasks)
    preference = arguments.check_preference(preference)
    arguments.check_range("norm", norm, "(0, inf)")
    arguments.check_range("decay", decay, "[0, 1)")
    arguments.check_choice("per_example", per_example, (True, False))

    def init_fn():
        return LossBalancerState(
            totals=jnp.zeros(num_tasks, float),
            norms=jnp.zeros(num_tasks, float),
        )

    def step(state, gram):
        exists = tasks.present(gram)
        totals = jnp.where(exists, decay * state.totals + 1, state.totals)
        change = jnp.sqrt(jnp.diagonal(gram)) - state.norms
        norms = state.norms + jnp.where(exists, change * base.reciprocal(totals), 0)
        shares = arguments.preference_among_present(preference, gram)
        shares = shares * base.reciprocal(shares.sum())
        weights = jnp.where(exists, norm * shares * base.reciprocal(norms), 0)
        return weights, LossBalancerState(totals, norms)

    balance = base.from_state(init_fn, step, num_tasks, reads=["gram"])
    if not per_example:
        return balance

    def update(updates, state, params=None, **extra_args):
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        view = tasks.GramView(
            num_tasks,
            lambda: jnp.diag(_norm_of_examples(updates) ** 2),
            lambda weights: tasks.combine(weights, updates),
        )
        return balance.update(view, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(balance.init, update)


def _norm_of_examples(updates):
    """Averages over the examples of the norms of their gradients, shape ``(T,)``."""
    shapes = jax.tree.map(lambda x: jnp.shape(x)[1:], updates)
    sizes = {jnp.shape(x)[1:2] for x in jax.tree.leaves(updates)}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            "loss_balancer(per_example=True) takes the leading axis of each parameter"
            f" for that of the examples, but they have the shapes {shapes}: it is for"
            " features, as in optax_mtl.value_and_grad_at_features"
        )
    over_examples = jax.vmap(tasks.squared_norms, in_axes=1)
    return jnp.sqrt(over_examples(updates)).mean(axis=0)
