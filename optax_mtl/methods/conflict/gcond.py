"""GCond, the gradient conductor: accumulate, then resolve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, report, tasks


class Arbitration(NamedTuple):
    """What the arbiter of :func:`gcond` did in one update."""

    cosines: jax.Array  # Of the accumulated gradients, shape `(num_tasks, num_tasks)`.
    coefficients: jax.Array  # Resolved gradient i is `sum_j coefficients[i, j] g_j`.
    winners: jax.Array  # Of the last conflicts, the newest last; -1 where none yet.
    iterations: jax.Array  # Conflicts resolved in this update.


class GCondState(NamedTuple):
    """State of :func:`gcond`."""

    previous: optax.Updates  # Directions of the last gradients, one per task.
    norms: jax.Array  # Running mean of the norms, shape `(num_tasks,)`; 0: not seen.
    arbitration: Arbitration  # The last one; its winners serve the next.

    def __repr__(self):
        return report.describe_state(self)


def gcond(
    num_tasks: int,
    *,
    thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0),
    power: jax.typing.ArrayLike = 2.0,
    tie_breaking: tuple[float, float] = (0.8, 0.2),
    dominance_window: int = 3,
    norm_decay: jax.typing.ArrayLike = 0.95,
    norm_cap: jax.typing.ArrayLike | None = None,
    max_iters: int | None = None,
    smooth: bool = True,
    reference: str = "accumulated",
    dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient conductor (GCond).

    Takes gradients that were accumulated over many micro-batches (see
    :func:`~optax_mtl.accumulate_task_grads`) and, as long as two of them conflict,
    lets an arbiter name a winner :math:`w` and a loser :math:`l` of the pair with
    the smallest cosine :math:`c`, and projects both at once:

    .. math::

      w \leftarrow w - \sin\alpha \, \frac{\langle w, l\rangle}{\|l\|^2} \, l, \qquad
      l \leftarrow l - \sin(\min(\alpha, \tfrac{\pi}{2})) \,
      \frac{\langle w, l\rangle}{\|w\|^2} \, w.

    The angle :math:`\alpha(c)` grows from 0 at the weakest threshold (nothing
    happens) over :math:`\pi/2` at the main one (both become orthogonal to the
    other's old value) to :math:`\pi` at the critical one (the loser gives way
    alone). The update is the sum of the resolved gradients.

    The winner is the task with the larger score: how well its gradient agrees with
    its own last one, and how large its norm is for what it usually is. A task that
    won ``dominance_window`` times in a row loses, so that no other one stagnates.

    Args:
      num_tasks: number of tasks.
      thresholds: the critical, main and weak cosine, in ascending order.
      power: of the growth of the angle between the main and the critical cosine.
        Positive.
      tie_breaking: weights of stability and of strength in the score. At least 0.
      dominance_window: how many wins in a row make a task lose; 0: no limit. At least
        0.
      norm_decay: decay of the running mean of each task's norm. In [0, 1).
      norm_cap: largest norm of a task's gradient; longer ones are scaled down.
        Positive.
      max_iters: most conflicts to resolve in an update; by default twice the number of
        tasks. At least 0.
      smooth: whether the angle varies smoothly. Otherwise the thresholds bound
        zones, in which the loser becomes zero (critical), the loser alone is
        projected (main), or both are projected without an arbiter (weak).
      reference: what a gradient should agree with to be called stable: the last
        ``"accumulated"`` gradient (as in the paper) or the last ``"resolved"`` one.
        The latter is the authors' code exactly, given their running norms, which
        start at 1.
      dtype: of the stored last gradients; by default that of the parameters.

    Returns:
      A gradient transformation that aggregates stacked updates. Its state holds the
      last :class:`~optax_mtl.methods.conflict.gcond.Arbitration`, to be read with
      ``optax.tree.get(state, "arbitration")``.

    Raises:
      ValueError: if the thresholds are not in ascending order within [-1, 1], or if
        the reference is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 0.0], [-1.2, 1.6]])
      >>> method = optax_mtl.gcond(num_tasks=2)
      >>> state = method.init(jnp.zeros(2))
      >>> update, state = method.update(updates, state)
      >>> print(jnp.array_str(update, precision=3))
      [0.622 2.08 ]
      >>> print(state.arbitration.winners)
      [-1 -1  1]

      The paper's integrated scheme: momentum between GCond and an AdamW without it.

      >>> tx = optax.chain(
      ...     optax_mtl.gcond(num_tasks=2),
      ...     optax.ema(0.9),
      ...     optax.adamw(2e-4, b1=0.0, b2=0.95, weight_decay=0.05),
      ... )
      >>> params = jnp.array([1.0, 2.0])
      >>> update, state = tx.update(updates, tx.init(params), params)
      >>> print(jnp.round(1e4 * update, 2))
      [-2.1 -2.2]

      Its pure scheme: the optimizer as usual.

      >>> tx = optax.chain(optax_mtl.gcond(num_tasks=2), optax.adamw(2e-4))
      >>> update, state = tx.update(updates, tx.init(params), params)
      >>> print(jnp.round(1e4 * update, 2))
      [-2. -2.]

    References:
      Limarenko et al, `GCond: Gradient Conflict Resolution via Accumulation-based
      Stabilization for Large-Scale Multi-Task Learning
      <https://arxiv.org/abs/2509.07252>`_, 2025

    .. note::
      The native scale is the sum. All products are taken once, before anything is
      projected; the arbiter works on coefficients. The authors' code starts the
      running means of the norms at 1 and compares with absolute constants; here they
      start at the mean norm of the first gradients, and no result depends on the
      scale of the gradients. An exactly zero gradient takes no part and leaves the
      statistics of its task alone. The authors' README says that a dominating task
      wins; their code and the paper say, as here, that it loses.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("power", power, "(0, inf)")
    arguments.check_range("tie_breaking", tie_breaking, "[0, inf)")
    arguments.check_count("dominance_window", dominance_window, least=0)
    arguments.check_range("norm_decay", norm_decay, "[0, 1)")
    arguments.check_range("norm_cap", norm_cap, "(0, inf]", optional=True)
    arguments.check_count("max_iters", max_iters, least=0, optional=True)
    arguments.check_choice("smooth", smooth, (True, False))
    arguments.check_choice("reference", reference, ("accumulated", "resolved"))
    arguments.check_static("thresholds", thresholds)
    arguments.check_dtype("dtype", dtype)
    critical, main, weak = thresholds
    if not -1 <= critical <= main <= weak <= 1:
        raise ValueError(
            "gcond: thresholds must be (critical, main, weak) with "
            f"-1 <= critical <= main <= weak <= 1, got {thresholds}"
        )

    def init_fn(params):
        return GCondState(
            previous=base.zeros_like(params, num_tasks, dtype=dtype),
            norms=jnp.zeros(num_tasks),
            arbitration=Arbitration(
                cosines=jnp.zeros((num_tasks, num_tasks)),
                coefficients=jnp.zeros((num_tasks, num_tasks)),
                winners=jnp.full(max(dominance_window, 1), -1, jnp.int32),
                iterations=jnp.zeros([], jnp.int32),
            ),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        gram, products = tasks.inner_products(updates, updates, state.previous)
        finite = base.all_finite(gram)
        norms = jnp.sqrt(jnp.diagonal(gram))
        here = tasks.present(gram) & finite
        inverse = jnp.where(here, 1 / jnp.where(here, norms, 1), 0)

        # A task seen for the first time starts at the mean norm of those present.
        start = jnp.sum(jnp.where(here, norms, 0)) / jnp.maximum(here.sum(), 1)
        means = jnp.where(state.norms > 0, state.norms, start)
        means = norms + jnp.asarray(norm_decay) * (means - norms)
        capped = jnp.minimum(norms, jnp.inf if norm_cap is None else norm_cap)

        # Resolved in units of the norms, so that rounding knows no task's scale.
        cosines = measures.cosine_similarity(gram)
        unit, winners, iterations = gcond_coefficients(
            cosines,
            inverse[:, None] * products,
            capped / jnp.where(here, means, 1),
            state.arbitration.winners,
            thresholds=thresholds,
            power=power,
            tie_breaking=tie_breaking,
            dominance_window=dominance_window,
            max_iters=max_iters,
            smooth=smooth,
        )
        coefficients = unit * jnp.outer(capped, inverse)
        arbitration = Arbitration(cosines, coefficients, winners, iterations)

        if reference == "accumulated":
            direction = lambda x: tasks.along_tasks(inverse, x) * x
        else:
            squares = jnp.sum(_dot(unit, cosines) * unit, axis=1, keepdims=True)
            inverse_length = base.reciprocal(jnp.sqrt(jnp.maximum(squares, 0)))
            direction = lambda x: _dot(unit * inverse_length * inverse[None], x)
        remember = lambda x, p: jnp.where(
            tasks.along_tasks(here, p), direction(x).astype(p.dtype), p
        )
        weights = jnp.where(finite, coefficients.sum(0), jnp.nan)
        return tasks.combine(weights, updates), GCondState(
            previous=jax.tree.map(remember, updates, state.previous),
            norms=jnp.where(here, means, state.norms).astype(state.norms.dtype),
            arbitration=base.keep_if(finite, arbitration, state.arbitration),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def gcond_coefficients(
    cosines: jax.Array,
    stability: jax.Array,
    strength: jax.Array,
    winners: jax.Array,
    *,
    thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0),
    power: jax.typing.ArrayLike = 2.0,
    tie_breaking: tuple[float, float] = (0.8, 0.2),
    dominance_window: int = 3,
    max_iters: int | None = None,
    smooth: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arbiter of :func:`gcond`, for task gradients of length 1.

    Args:
      cosines: of the gradients, shape `(num_tasks, num_tasks)`; the row and column
        of an absent task are zero.
      stability: cosine of gradient i with the last gradient of task j.
      strength: norm of each gradient for what it usually is, shape `(num_tasks,)`.
      winners: of the last conflicts, the newest last.
      thresholds: as all that follow, see :func:`gcond`.
      power: of the growth of the angle.
      tie_breaking: weights of stability and of strength.
      dominance_window: how many wins in a row make a task lose.
      max_iters: most conflicts to resolve.
      smooth: whether the angle varies smoothly.

    Returns:
      The coefficients of the resolved gradients (number i is
      `sum_j coefficients[i, j] g_j`), the new winners, and how many conflicts were
      resolved.
    """
    weak = thresholds[2]
    present = tasks.present(cosines)
    limit = 2 * present.sum() if max_iters is None else max_iters

    def unresolved(carry):
        _, _, iterations, _, conflict = carry
        return (conflict.cosine < weak) & (iterations < limit)

    def resolve(carry):
        coefficients, winners, iterations, gram, conflict = carry
        pair, cosine = conflict.pair, conflict.cosine
        lengths = conflict.lengths[pair]
        agreement = jnp.sum(coefficients[pair] * stability[:, pair].T, axis=1) / lengths
        force = lengths * strength[pair] / jnp.sum(lengths * strength[pair])
        score = tie_breaking[0] * jnp.maximum(agreement, 0) + tie_breaking[1] * force
        first_wins = score[0] >= score[1]
        if dominance_window:
            dominant = jnp.where((winners == winners[0]).all(), winners[0], -1)
            first_wins = (first_wins | (dominant == pair[1])) & (dominant != pair[0])
        pair = jnp.where(first_wins, pair, pair[::-1])  # The winner and the loser.

        if smooth:
            factors = _smooth_factors(cosine, thresholds, power)
            kept, arbitrated = jnp.ones(2, cosines.dtype), True
        else:
            factors, kept, arbitrated = _zone_factors(cosine, thresholds)
        both = coefficients[pair]
        share = factors * gram[pair[0], pair[1]] / jnp.diag(gram)[pair[::-1]]
        both = kept[:, None] * both - share[:, None] * both[::-1]

        coefficients = coefficients.at[pair].set(both)
        rows = _dot(_dot(both, cosines), coefficients.T)
        gram = gram.at[pair].set(rows).at[:, pair].set(rows.T)
        appended = jnp.roll(winners, -1).at[-1].set(pair[0])
        winners = jnp.where(arbitrated, appended, winners)
        conflict = _worst_conflict(coefficients, gram, weak)
        return coefficients, winners, iterations + 1, gram, conflict

    coefficients = jnp.eye(len(cosines), dtype=cosines.dtype)
    conflict = _worst_conflict(coefficients, cosines, weak)
    carry = (coefficients, winners, jnp.zeros([], jnp.int32), cosines, conflict)
    return jax.lax.while_loop(unresolved, resolve, carry)[:3]


class _Conflict(NamedTuple):
    pair: jax.Array
    cosine: jax.Array  # 2 if no two gradients are in conflict.
    lengths: jax.Array


def _worst_conflict(coefficients, gram, weak):
    """The two of all gradients with the smallest cosine."""
    # Rounding errors are as large as the terms that cancelled. A gradient that is no
    # longer than that is gone; a pair that is as close to `weak` is no conflict.
    rounding = 16 * jnp.finfo(gram.dtype).eps
    terms = jnp.abs(coefficients).sum(1)
    squares = jnp.diag(gram)
    there = squares > rounding * terms**2
    lengths = jnp.sqrt(jnp.where(there, squares, 1))
    cosine = gram / jnp.outer(lengths, lengths)
    slack = rounding * jnp.outer(terms / lengths, terms / lengths)
    conflicts = jnp.triu(jnp.outer(there, there) & (cosine < weak - slack), 1)
    cosine = jnp.where(conflicts, cosine, 2)
    pair = jnp.stack(jnp.unravel_index(cosine.argmin(), cosine.shape))
    return _Conflict(pair.astype(jnp.int32), cosine.min(), lengths)


def _smooth_factors(cosine, thresholds, power):
    """How much of its projection the winner and the loser give up."""
    critical, main, weak = thresholds
    # Either fraction is 0 or 1 outside of its interval, also of an empty one.
    mild = jnp.clip((weak - cosine) / max(weak - main, 1e-30), 0, 1)
    severe = jnp.clip((main - cosine) / max(main - critical, 1e-30), 0, 1)
    angle = jnp.pi / 2 * (mild + severe**power)
    return jnp.sin(jnp.stack([angle, jnp.minimum(angle, jnp.pi / 2)]))


def _zone_factors(cosine, thresholds):
    """The same in steps, what is kept of both, and whether there was an arbiter."""
    critical, main, _ = thresholds
    is_critical, is_weak = cosine < critical, cosine >= main
    factors = jnp.stack([is_weak, ~is_critical]).astype(cosine.dtype)
    kept = jnp.stack([True, ~is_critical]).astype(cosine.dtype)
    return factors, kept, ~is_weak


def scale_by_lion_lars(
    clip: jax.typing.ArrayLike = 50.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion's sign with LARS's layer-wise step, as GCond's authors use it.

    For each tensor :math:`p` and its smoothed gradient :math:`m` the update is

    .. math::

      \operatorname{sign}(m) \, \min(\|p\| / \|m\|, \text{clip}),

    with the ratio 1 if either norm is zero.

    Args:
      clip: largest ratio. Positive.

    Returns:
      A gradient transformation that needs `params`. It keeps no momentum: chain it
      after :func:`optax.ema`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_mtl
      >>> tx = optax.chain(
      ...     optax_mtl.gcond(num_tasks=2),
      ...     optax.ema(0.9),
      ...     optax_mtl.scale_by_lion_lars(),
      ...     optax.scale_by_learning_rate(1e-5),
      ... )
      >>> params = jnp.array([3.0, 4.0])
      >>> updates = jnp.array([[1.0, 0.0], [-1.2, 1.6]])
      >>> update, state = tx.update(updates, tx.init(params), params)
      >>> print(jnp.round(1e5 * update, 2))
      [-2.3 -2.3]

    References:
      Limarenko et al, `GCond: Gradient Conflict Resolution via Accumulation-based
      Stabilization for Large-Scale Multi-Task Learning
      <https://arxiv.org/abs/2509.07252>`_, 2025, section III.F
    """
    arguments.check_range("clip", clip, "(0, inf]")

    def scale(update, param):
        length, size = optax.tree.norm(update), optax.tree.norm(param)
        defined = (length > 0) & (size > 0)
        ratio = jnp.minimum(size / jnp.where(defined, length, 1), clip)
        return jnp.sign(update) * jnp.where(defined, ratio, 1).astype(update.dtype)

    return optax.with_extra_args_support(optax.stateless_with_tree_map(scale))


def _dot(a, b):
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
