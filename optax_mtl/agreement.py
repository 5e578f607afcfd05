"""Smaller steps where the gradients of the tasks disagree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, tasks


class AgreementState(NamedTuple):
    """State of :func:`scale_by_agreement`."""

    inner: Any  # State of the wrapped transformation.
    steps: jax.Array  # Agreements seen.
    agreement: jax.Array  # Moving average of the agreement.
    factor: jax.Array  # What the last updates were multiplied by.


def scale_by_agreement(
    tx: optax.GradientTransformation,
    *,
    measure: str = "alignment",
    rule: str = "power",
    smoothing: jax.typing.ArrayLike = 0.9,
    floor: jax.typing.ArrayLike = 0.1,
    power: jax.typing.ArrayLike = 1.0,
    threshold: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.5,
    growth: jax.typing.ArrayLike = 1.05,
    ceiling: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates of a whole chain by how much the tasks agree.

    .. math::

      \text{updates} \leftarrow
      \left(f + (1 - f) \, \max(\rho, 0)^q\right) \text{updates}, \qquad
      \rho = \operatorname{ema} \frac{\|\sum_i g_i\|}{\sum_i \|g_i\|},

    or, with ``rule="steps"``, by a factor that shrinks by ``decay`` in each step with
    :math:`1 - \rho` above ``threshold`` and grows by ``growth`` in the others.

    Wraps the chain, rather than being in it, because Adam undoes a factor on its
    gradients. The factor is in the state; log ``optax.tree.get(state, "factor")``.

    Args:
      tx: a chain from the gradients of the tasks to the updates of the parameters,
        such as ``optax.chain(optax_mtl.cagrad(), optax.adam(1e-3))``.
      measure: what :math:`\rho` is: the ``"alignment"`` as in the formula, or the
        ``"cosine"``, averaged over pairs of tasks.
      rule: ``"power"``, as in the formula, or ``"steps"``.
      smoothing: decay of the moving average of the measure, with bias correction. In
        [0, 1).
      floor: smallest factor, :math:`f`. In [0, 1].
      power: exponent :math:`q`. At least 0.
      threshold: dissimilarity :math:`1 - \rho` above which the factor shrinks. At least
        0.
      decay: factor by which it shrinks. In (0, 1].
      growth: factor by which it grows. At least 1.
      ceiling: largest factor of the ``"steps"``, which start from 1. Positive.

    Returns:
      A gradient transformation from stacked gradients to updates.

    Raises:
      ValueError: for an unknown measure or rule.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_mtl
      >>> tx = optax.chain(optax_mtl.linear(), optax.sgd(0.1))
      >>> tx = optax_mtl.scale_by_agreement(tx, floor=0.0)
      >>> updates = jnp.array([[1.0, 0], [0, 1]])
      >>> update, state = tx.update(updates, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=4), f"{state.factor:.4f}")
      [-0.0707 -0.0707] 0.7071

    References:
      A heuristic of this library, after tutorials that lower the learning rate
      where gradients conflict; no published algorithm was found.
    """
    arguments.check_choice("measure", measure, ("alignment", "cosine"))
    arguments.check_choice("rule", rule, ("power", "steps"))
    arguments.check_range("smoothing", smoothing, "[0, 1)")
    arguments.check_range("floor", floor, "[0, 1]")
    arguments.check_range("power", power, "[0, inf)")
    arguments.check_range("threshold", threshold, "[0, inf)")
    arguments.check_range("decay", decay, "(0, 1]")
    arguments.check_range("growth", growth, "[1, inf)")
    arguments.check_range("ceiling", ceiling, "(0, inf]")
    tx = arguments.as_transformation("tx", tx)

    def init_fn(params):
        return AgreementState(
            inner=tx.init(params),
            steps=jnp.zeros([], jnp.int32),
            agreement=jnp.zeros([], float),
            factor=jnp.ones([], float),
        )

    def next_factor(state, agreement):
        if rule == "steps":
            change = jnp.where(1 - agreement > threshold, decay, growth)
            return jnp.clip(state.factor * change, floor, ceiling)
        return floor + (1 - floor) * jnp.maximum(agreement, 0) ** power

    def update_fn(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, params, gram_suffices=True)
        if count is None:
            return updates, state
        gram = tasks.gram(updates)
        if isinstance(updates, tasks.GramView):  # Computed once for the chain as well.
            ways = updates.combine, updates.combine_some, updates.compute_apart
            updates = tasks.GramView(count, lambda: gram, *ways)
        now = measures.conflicts(gram).alignment
        if measure == "cosine":
            now = mean_cosine(gram)
        steps = optax.safe_increment(state.steps)
        average = smoothing * state.agreement + (1 - smoothing) * now
        debiased = average / (1 - smoothing**steps)
        new = (steps, average, next_factor(state, debiased))
        out, inner = tx.update(updates, state.inner, params, **extra_args)
        # Without any gradient there is nothing to measure, and nothing in a step that
        # is to be skipped.
        measured = base.all_finite((gram, out)) & jnp.any(tasks.present(gram))
        kept = base.keep_if(measured, new, state[1:])
        new_state = AgreementState(inner, *kept)
        scale = lambda u: (new_state.factor * u).astype(u.dtype)
        return jax.tree.map(scale, out), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mean_cosine(gram: jax.Array) -> jax.Array:
    """Mean cosine between each two of the present tasks, a scalar; 1 without a pair."""
    exists = tasks.present(gram)
    pairs = jnp.outer(exists, exists) & ~jnp.eye(len(gram), dtype=bool)
    total = jnp.sum(jnp.where(pairs, measures.cosine_similarity(gram), 0))
    return jnp.where(jnp.any(pairs), total / jnp.maximum(pairs.sum(), 1), 1)
