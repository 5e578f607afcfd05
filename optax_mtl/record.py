"""Conflicts kept in the state of a chain, and read back from it."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, base, measures, report, tasks
from optax_mtl.measures import Conflicts
from optax_mtl.wrappers import weigh


class RecordState(NamedTuple):
    """State of :func:`record_conflicts`."""

    steps: jax.Array  # Number of them, scalar.
    last: Conflicts  # Of the last step that was measured.
    sums: Conflicts  # Decayed sums of what was measured.
    mass: jax.Array  # What the sums are divided by, shape `(T, T)`.
    total: jax.Array  # The same for figures of all tasks, scalar.
    seen: jax.Array  # Steps in which both tasks had a gradient, shape `(T, T)`.
    opposed: jax.Array  # Of these, with a negative cosine, shape `(T, T)`.
    weights: jax.Array | None  # Of the method in the last step, shape `(T,)`.
    weight_sums: jax.Array | None
    inner: optax.OptState  # Of the method.

    def __repr__(self):
        return report.describe_state(self)


class Record(NamedTuple):
    """What :func:`recorded` returns."""

    last: Conflicts  # Of the last step that was measured.
    mean: Conflicts  # Running means of its figures.
    seen: jax.Array  # Steps in which both tasks had a gradient, shape `(T, T)`.
    conflicting: jax.Array  # Share of these with a negative cosine, shape `(T, T)`.
    weights: jax.Array | None  # That the method used in the last step, `(T,)`.
    mean_weights: jax.Array | None  # Their running means.

    def scalars(self) -> dict[str, float]:
        """The figures of the last step by name, for any logger of numbers.

        Examples:
          >>> import jax.numpy as jnp
          >>> import optax_mtl
          >>> recorder = optax_mtl.record_conflicts(2)
          >>> state = recorder.init(None)
          >>> _, state = recorder.update(jnp.array([[3.0, 4], [0, 2]]), state)
          >>> record = optax_mtl.recorded(state, names=["main", "aux"])
          >>> for name, value in record.scalars().items():
          ...     print(f"{name}: {value:.2f}")
          min_cosine: 0.80
          conflicting: 0.00
          alignment: 0.96
          norm/main: 5.00
          norm/aux: 2.00
          cosine/main,aux: 0.80
        """
        last = self.last
        names = last.names or tuple(map(str, range(len(last.norms))))
        found = {
            name: float(getattr(last, name))
            for name in ("min_cosine", "conflicting", "alignment")
        }
        found |= {
            f"norm/{name}": float(x) for name, x in zip(names, np.asarray(last.norms))
        }
        cosines = np.asarray(last.cosines)
        for i, j in itertools.combinations(range(len(names)), 2):
            found[f"cosine/{names[i]},{names[j]}"] = float(cosines[i, j])
        if self.weights is not None:
            weights = zip(names, np.asarray(self.weights))
            found |= {f"weight/{name}": float(x) for name, x in weights}
        return found

    def __repr__(self):
        return f"{self.last}\nmeans, of {self.seen.max()} steps:\n{self.mean}"


def record_conflicts(
    num_tasks: int,
    method: optax.GradientTransformationExtraArgs | None = None,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Records how much the gradients conflict, without touching the training loop.

    .. math::

      \bar c_t = \frac{\sum_{s \le t} a^{t - s} c_s}{\sum_{s \le t} a^{t - s}}

    for each figure :math:`c` of :func:`conflicts`, over the steps in which its tasks
    have a gradient. A link in front of a method, which passes on what it gets; or
    around a method, whose weights it then records as well.
    :func:`recorded` reads the state back.

    Args:
      num_tasks: number of tasks, T.
      method: any method that makes its weights from inner products or losses, to be
        resolved by; ``None`` for a link in front of a method of any kind.
      decay: :math:`a`, of the running means; 1 for means over all steps. In [0, 1].
      every: measures in one of so many steps, the first among them. At least 1. What
        a method needs for itself it still measures in each.

    Returns:
      A gradient transformation, of stacked updates or a :class:`GramView`: around a
      method its updates, else stacked updates as they were.

    Raises:
      TypeError: at the update, around a method that reads the gradients themselves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> tx = optax.chain(
      ...   optax_mtl.record_conflicts(2), optax_mtl.pcgrad(), optax.adamw(1e-3)
      ... )
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for updates in [[[1.0, 0, 0], [0, 2, 0]], [[-4.0, 1, 1], [6, 1, 1]]]:
      ...     _, state = tx.update(jnp.array(updates), state, params)
      >>> record = optax_mtl.recorded(state, names=["main", "aux"])
      >>> print(record.last)
      100% of the pairs of 2 tasks conflict; alignment 0.33
      most opposed: main and aux, cosine -0.84
                norm   main   aux
      main      4.24   1.00 -0.84
      aux       6.16  -0.84  1.00
      >>> print(f"{record.mean.min_cosine:.2f}, {record.conflicting[0, 1]:.0%}")
      -0.42, 50%

    .. note::
      For each layer or block on its own: ``per_group(record_conflicts(T), labels)``,
      whose groups :func:`recorded` names. Where the gradients are known through their
      Gram matrix, recorder and method compute it once. In front of a method that reads
      losses alone, every measurement costs T backward passes: see ``every``. A step
      whose gradients are not finite is not recorded.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_range("decay", decay, "[0, 1]")
    arguments.check_count("every", every)
    inner = arguments.as_transformation("method", method or optax.identity())

    def init(params):
        figures = measures.conflicts(jnp.zeros((num_tasks, num_tasks)))
        zeros = lambda dtype=float: jnp.zeros((num_tasks, num_tasks), dtype)
        weights = lambda: jnp.zeros(num_tasks) if method else None
        return RecordState(
            steps=jnp.zeros([], jnp.int32),
            last=jax.tree.map(jnp.copy, figures),
            sums=jax.tree.map(jnp.zeros_like, figures),
            mass=zeros(),
            total=jnp.zeros([]),
            seen=zeros(jnp.int32),
            opposed=zeros(jnp.int32),
            weights=weights(),
            weight_sums=weights(),
            inner=inner.init(params) if method else optax.EmptyState(),
        )

    def update(updates, state, params=None, **extra_args):
        count = tasks.check_stacked(updates, params, num_tasks, gram_suffices=True)
        if count is None:
            return updates, state
        if every == 1 and isinstance(updates, tasks.GramView):
            updates = updates.measured()
        out, weights, new_inner = updates, None, state.inner
        if method:
            weights, exists, new_inner = weigh(
                "record_conflicts", inner, count, updates, state.inner, **extra_args
            )
            weights = jnp.where(exists, weights, 0)
            out = tasks.combine(weights, updates)
        measure = lambda: _measured(state, tasks.gram(updates), weights, decay)
        if every == 1:
            measured = measure()
        else:
            measured = jax.lax.cond(state.steps % every == 0, measure, lambda: state)
        new_state = measured._replace(
            steps=optax.safe_increment(state.steps), inner=new_inner
        )
        if method:
            new_state = base.keep_if(base.all_finite(out), new_state, state)
        return out, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _measured(
    state: RecordState,
    gram: jax.Array,
    weights: jax.Array | None,
    decay: jax.typing.ArrayLike,
) -> RecordState:
    """The state after one more measurement; as it was if that is not finite."""
    found = measures.conflicts(gram)
    exists = tasks.present(gram)
    both = jnp.outer(exists, exists)
    add = lambda total, new, there: jnp.where(there, decay * total + new, total)
    there = _like_figures(exists, both, exists.any())
    new_state = state._replace(
        last=found,
        sums=jax.tree.map(add, state.sums, found, there),
        mass=add(state.mass, 1, both),
        total=add(state.total, 1, exists.any()),
        seen=state.seen + both,
        opposed=state.opposed + (both & (found.cosines < 0)),
    )
    if weights is not None:
        new_state = new_state._replace(
            weights=weights, weight_sums=add(state.weight_sums, weights, exists)
        )
    return base.keep_if(base.all_finite((gram, weights)), new_state, state)


def _like_figures(
    of_tasks: jax.Array, pairs: jax.Array, of_all: jax.Array
) -> Conflicts:
    """What belongs to each figure of a report, by what the figure is about."""
    return Conflicts(of_tasks, pairs, of_all, of_all, of_all)


def recorded(opt_state: Any, names: Any = None) -> Any:
    """Reads back what :func:`record_conflicts` recorded, from any state that holds it.

    Args:
      opt_state: the state of a chain, whatever is around the recorder; a ``TrainState``
        or an ``nnx.Optimizer`` that holds it.
      names: of the tasks: the dict of their losses, or a sequence of names in the order
        of the gradients.

    Returns:
      A :class:`Record`; a dict of them by the name of the group where there are
      several, as from ``per_group(record_conflicts(T), labels)``.

    Raises:
      ValueError: if nothing was recorded there.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> recorder = optax_mtl.per_group(
      ...   optax_mtl.record_conflicts(2), lambda path: path
      ... )
      >>> params = {"trunk": jnp.zeros(2), "last": jnp.zeros(1)}
      >>> updates = {"trunk": jnp.eye(2), "last": jnp.array([[1.0], [-3]])}
      >>> _, state = recorder.update(updates, recorder.init(params))
      >>> for group, record in optax_mtl.recorded(state).items():
      ...     print(group, record.last.min_cosine)
      last -1.0
      trunk 0.0
    """
    if hasattr(opt_state, "opt_state"):
        opt_state = opt_state.opt_state
    is_state = lambda x: isinstance(x, RecordState)
    found = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            opt_state, is_leaf=is_state
        )
        if is_state(leaf)
    ]
    if not found:
        raise ValueError(
            "nothing was recorded in this state: put"
            " optax_mtl.record_conflicts(num_tasks) in front of the method, and hand"
            " over the state of that chain"
        )
    records = [_record(state, names) for _, state in found]
    if len(records) == 1:
        return records[0]
    in_dict = lambda path: [x.key for x in path if hasattr(x, "key")]
    groups = ["/".join(map(str, in_dict(path))) for path, _ in found]
    if len(set(groups)) < len(groups):  # Several recorders in one chain.
        groups = [jax.tree_util.keystr(path) for path, _ in found]
    return dict(zip(groups, records))


def _record(state: RecordState, names: Any) -> Record:
    # Flax NNX keeps the arrays of an optimizer in variables.
    state = jax.tree.map(
        lambda x: x[...], state, is_leaf=lambda x: hasattr(x, "get_value")
    )
    known = measures.names_for(names, len(state.mass))
    mean = lambda total, mass: total * base.reciprocal(mass)
    of_tasks = jnp.diagonal(state.mass)
    mass = _like_figures(of_tasks, state.mass, state.total)
    weights = state.weight_sums
    return Record(
        last=state.last._replace(names=known),
        mean=jax.tree.map(mean, state.sums, mass)._replace(names=known),
        seen=state.seen,
        conflicting=mean(state.opposed, state.seen.astype(float)),
        weights=state.weights,
        mean_weights=None if weights is None else mean(weights, of_tasks),
    )
