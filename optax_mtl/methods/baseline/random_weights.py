"""Random loss weighting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base

DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli", "random_normal")


class RandomWeightsState(NamedTuple):
    """State of :func:`random_weights`."""

    key: jax.Array  # Data of a key, fixed; each step folds in its number.
    steps: jax.Array  # Number of steps.


def random_weights(
    distribution: str = "normal", *, key: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Random loss weighting (RLW): new random weights in every step.

    .. math::

      d = \sum_i w_i g_i, \quad w = \operatorname{softmax}(z), \quad
      z \sim \mathcal{N}(0, I)

    The weights are not negative and sum to 1, with an expectation of :math:`1 / T`
    each (but for ``"random_normal"``): a control that a weighting which claims to
    be informed should beat. Absent tasks are drawn a weight as well: as in the paper,
    the weights know nothing about the batch.

    Args:
      distribution: where the weights come from.

        * ``"normal"``: softmax of standard normal numbers.
        * ``"uniform"``: softmax of uniform numbers between 0 and 1.
        * ``"dirichlet"``: uniform over all weights that sum to 1.
        * ``"bernoulli"``: equal weights for a random set of tasks, not empty.
        * ``"random_normal"``: softmax of normal numbers whose mean and standard
          deviation, for each task, are drawn once between 0 and 1.
      key: seed or typed random key.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for an unknown distribution.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> method = optax_mtl.random_weights(key=3)
      >>> update, _ = method.update(jnp.eye(3), method.init(jnp.zeros(3)))
      >>> print(f"{update.min() > 0} {update.sum():.3f}")
      True 1.000

    References:
      Lin et al, `Reasonable Effectiveness of Random Weighting: A Litmus Test for
      Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_, TMLR 2022
    """
    arguments.check_choice("distribution", distribution, DISTRIBUTIONS)
    arguments.check_key(key)

    def init_fn():
        return RandomWeightsState(arguments.key_data(key), jnp.zeros([], jnp.int32))

    def step(state, count):
        weights = draw(
            arguments.key_of(state.key, key), state.steps, count, distribution
        )
        return weights, state._replace(steps=optax.safe_increment(state.steps))

    return base.from_state(init_fn, step, reads=[])


def draw(
    key: jax.Array,
    step: jax.typing.ArrayLike,
    num_tasks: int,
    distribution: str = "normal",
) -> jax.Array:
    """Weights of :func:`~optax_mtl.random_weights` in one step.

    Args:
      key: typed random key, the same for all steps.
      step: number of the step, at least 0.
      num_tasks: number of tasks, T.
      distribution: as in :func:`~optax_mtl.random_weights`.

    Returns:
      Array of shape ``(T,)``.

    Raises:
      ValueError: for an unknown distribution.
    """
    arguments.check_choice("distribution", distribution, DISTRIBUTIONS)
    task_key, steps_key = jax.random.split(key)
    key = jax.random.fold_in(steps_key, step)
    shape = (num_tasks,)
    if distribution == "dirichlet":
        return jax.random.dirichlet(key, jnp.ones(shape))
    if distribution == "bernoulli":
        chosen = _nonempty_subset(key, num_tasks).astype(float)
        return chosen / chosen.sum()
    if distribution == "uniform":
        return jax.nn.softmax(jax.random.uniform(key, shape))
    z = jax.random.normal(key, shape)
    if distribution == "random_normal":
        means, deviations = jax.random.uniform(task_key, (2, num_tasks))
        z = means + deviations * z
    return jax.nn.softmax(z)


def _nonempty_subset(key, num_tasks):
    """Fair coins, tossed again while all of them are tails."""

    def toss(carry):
        key, toss_key = jax.random.split(carry[0])
        return key, jax.random.bernoulli(toss_key, shape=(num_tasks,))

    empty = jnp.zeros(num_tasks, bool)
    _, chosen = jax.lax.while_loop(lambda carry: ~carry[1].any(), toss, (key, empty))
    return chosen
