"""A fair race: methods against the plain and the tuned sum, at equal cost.

All learning rates and seeds of a method run as one compiled program. The rate of each
method, and the weights of the tuned sum, are chosen on figures that are not reported.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, catalog, measures, scores, tasks
from optax_mtl.comparison import Comparison
from optax_mtl.gradients.backward import stack_task_losses
from optax_mtl.gradients.resolved import value_and_grad
from optax_mtl.labels import Labels

NUM_POINTS = 20  # Of the recorded history.
HELD_OUT = 10  # Batches to evaluate on, without evaluate.
MAX_BYTES = 2**30  # Of parameters and gradients that train at the same time.


def compare(
    losses_fn: Callable[[Any, Any], Any],
    init_fn: Callable[[jax.Array], optax.Params],
    batch_fn: Callable[[jax.Array, jax.Array], Any],
    methods: Sequence[str] | Mapping[str, Callable[[int], Any]],
    *,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2),
    seeds: int = 3,
    num_steps: int = 1000,
    weightings: int = 8,
    evaluate: Callable[[optax.Params], Mapping[str, Any]] | None = None,
    select: Callable[[optax.Params], Mapping[str, Any]] | None = None,
    maximise: Collection[str] = (),
    shared: Labels | None = None,
    single_task: bool = False,
    update_budget: str = "steps",
    conflicts: bool = True,
    chunk: int | None = None,
    progress: bool = True,
) -> Comparison:
    r"""Races methods against the plain sum and the tuned sum of the losses.

    Every method, the plain sum and ``weightings`` static weightings of it train with
    every learning rate and seed. For each the rate is chosen, and among the weightings
    the tuned sum, by the mean relative change of the metrics,

    .. math::

      \Delta m = \frac{100}{K} \sum_k \pm \frac{m_k - b_k}{|b_k|},

    with :math:`b` the median of the plain sum, on figures that are not reported:
    with ``select``, or without ``evaluate``, on a split of its own, and otherwise on
    as many further seeds.

    Args:
      losses_fn: from parameters and one batch to a dict of scalar losses, or a vector
        of shape ``(T,)``.
      init_fn: from a key to the parameters.
      batch_fn: from a key, the same in all steps of a run, and the number of the step
        to a batch. Traced; ``jax.random.fold_in(key, step)`` makes the randomness.
      methods: names of the catalog, or a dict from names to functions of the number of
        tasks that return a method.
      optimizer: from a learning rate, which is traced, to the optimizer of all runs.
      learning_rates: what every row is tried with.
      seeds: how many are reported. With one there is no spread.
      num_steps: of every run.
      weightings: how many static weightings rival the plain sum. Weights are drawn
        with :math:`\log_{10} w_i` uniform in [-1, 1] and scaled to sum to T.
      evaluate: from parameters to metrics by name, scalars. By default the losses,
        averaged over ten batches with keys that no run trains on: held out only if
        ``batch_fn`` draws new examples, so that with a fixed data set it is needed.
      select: as ``evaluate``, the same metrics on another split, for the selection.
      maximise: names of the metrics of which more is better.
      shared: which parameters the methods resolve, as in :func:`value_and_grad`.
      single_task: whether each task also trains alone, for the change against it.
      update_budget: ``"steps"``: as many steps for all. ``"flops"``: for the methods,
        as many as cost what ``num_steps`` of the plain sum do, counted by the
        compiler, which counts the body of a loop within ``losses_fn`` once.
      conflicts: whether to measure the smallest cosine of two tasks at 20 points of
        every run. Each takes the gradients of all tasks and their Gram matrix: with
        hundreds of tasks, far more than the training of the sums.
      chunk: how many runs train at the same time. By default as many as keep
        parameters and the gradients of all tasks below 1 GB.
      progress: whether to show a bar, if tqdm is installed.

    Returns:
      A :class:`Comparison`; ``print`` shows its table and its verdict. After an
      interrupt, of what was finished by then.

    Raises:
      ValueError: for a method that is not in the catalog, a name in ``maximise`` that
        is no metric, metrics that are not scalars, and numbers out of range.
      TypeError: for a method that needs what is not there.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda x, batch: {
      ...     "a": ((x - 1) ** 2).sum() + batch, "b": 9 * (x**2).sum()}
      >>> result = optax_mtl.compare(
      ...     losses_fn, lambda key: jax.random.normal(key, (2,)),
      ...     lambda key, step: 1.0, ["mgda"], num_steps=20, seeds=2, weightings=2,
      ...     learning_rates=[0.01, 0.1], progress=False)
      >>> result.methods
      ('sum', 'weighting 1', 'weighting 2', 'mgda')
      >>> result.values.shape
      (4, 2, 2, 2)

    References:
      Kurin et al, `In Defense of the Unitary Scalarization for Deep Multi-Task
      Learning <https://arxiv.org/abs/2201.04122>`_, NeurIPS 2022; Xin et al, `Do
      Current Multi-Task Optimization Methods in Deep Learning Even Help?
      <https://arxiv.org/abs/2209.11379>`_, NeurIPS 2022.
    """
    arguments.check_count("seeds", seeds)
    arguments.check_count("num_steps", num_steps)
    arguments.check_count("weightings", weightings, least=0)
    arguments.check_count("chunk", chunk, optional=True)
    arguments.check_choice("single_task", single_task, (True, False))
    arguments.check_choice("conflicts", conflicts, (True, False))
    arguments.check_choice("update_budget", update_budget, ("steps", "flops"))
    arguments.check_range("learning_rates", learning_rates, "(0, inf)")
    rates = np.asarray(learning_rates, np.float32).reshape(-1)
    arguments.check_count("the number of learning_rates", rates.size)
    functions = {"losses_fn": losses_fn, "init_fn": init_fn, "batch_fn": batch_fn}
    for name, function in (functions | {"optimizer": optimizer}).items():
        arguments.check_function(name, function)

    params, batch = jax.eval_shape(
        lambda key: (init_fn(key), batch_fn(key, jnp.int32(0))), jax.random.key(0)
    )
    try:
        losses = jax.eval_shape(losses_fn, params, batch)
    except TypeError as error:
        error.add_note("compare calls losses_fn(params, batch), with the batch as one.")
        raise
    num_tasks = jax.eval_shape(stack_task_losses, losses).size
    names = tasks.names_of(losses) or [str(i) for i in range(num_tasks)]
    on_split = select is not None or evaluate is None
    if evaluate is None:
        evaluate, by_default = (
            _on_batches(losses_fn, batch_fn, names, number) for number in range(2)
        )
        select = select or by_default
    metrics = _names_of_metrics("evaluate", evaluate, params)
    if select is not None and _names_of_metrics("select", select, params) != metrics:
        raise ValueError("evaluate and select should return metrics of the same names")
    scores.signs_of(metrics, maximise)

    weights = _draw_weights(weightings, num_tasks)
    static = np.concatenate([weights, np.eye(num_tasks)[: num_tasks * single_task]])
    rows = ["sum", *(f"weighting {i + 1}" for i in range(weightings))]
    rows += [f"only {name}" for name in names[: num_tasks * single_task]]
    racers = [_Racer(rows, static.astype(np.float32), *_weighted_sum(losses_fn))]
    for name, make in _factories(methods).items():
        resolve = value_and_grad(losses_fn, make(num_tasks), shared=shared)
        racer = _Racer([name], np.ones((1, num_tasks), np.float32), *_method(resolve))
        try:
            step = lambda p, b, f=racer: f.resolve(p, f.init(p), b, f.weights[0])
            jax.eval_shape(step, params, batch)
        except (TypeError, ValueError) as error:
            error.add_note(f"This is method {name!r} of the race.")
            raise
        racers.append(racer)

    lengths = [num_steps] * len(racers)
    if update_budget == "flops":
        costs = [_flops(racer, params, batch, num_tasks) for racer in racers]
        lengths = [max(1, round(num_steps * costs[0] / cost)) for cost in costs]
    num_points = min(NUM_POINTS, *lengths)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    # The gradients of the tasks; parameters, state, gradient and updates about once.
    chunk = chunk or max(1, MAX_BYTES // ((num_tasks + 6) * size))
    all_seeds = np.arange(seeds if on_split else 2 * seeds)
    measured = [evaluate] if select is None else [evaluate, select]
    cosine = lambda params, seeds, start: jnp.full(len(seeds), jnp.nan)
    if conflicts:
        cosine = _cosines(losses_fn, batch_fn, shared, num_tasks)
    programs = _Programs(
        init=jax.jit(jax.vmap(lambda seed: init_fn(_keys(seed)[0]))),
        cosine=cosine,
        measure=jax.jit(
            jax.vmap(lambda x: [_as_vector(f(x), metrics) for f in measured])
        ),
    )

    found, times = [], []
    bar = _bar(len(racers) if progress else 0)
    try:
        for racer, length in zip(racers, lengths):
            bar.set_description(racer.names[0])
            grid = (len(racer.names), len(rates), len(all_seeds))
            row, rate, seed = (x.reshape(-1) for x in np.indices(grid))
            settings = rates[rate], all_seeds[seed], racer.weights[row]
            bounds = np.linspace(0, length, num_points + 1).astype(np.int32)
            train = _trainer(racer, batch_fn, optimizer, programs, bounds)
            results, seconds = _in_chunks(train, settings, chunk)
            found.append([x.reshape(grid + x.shape[1:]) for x in results])
            times.append(seconds / length)
            bar.update()
    except KeyboardInterrupt:
        if not found:
            raise
    finally:
        bar.close()

    *parts, history, cosines = map(np.concatenate, zip(*found))
    tables = np.stack(parts).astype(np.float64)
    finite = np.isfinite(tables).all(axis=(0, -1), keepdims=True)
    tables = np.where(finite, tables, np.nan)
    values, selection = tables if on_split else np.split(tables[0], 2, axis=2)
    counts = [len(racer.names) for racer in racers[: len(found)]]
    rule = "on a split of its own" if on_split else f"on {seeds} seeds not reported"
    return Comparison(
        methods=tuple(x for racer in racers[: len(found)] for x in racer.names),
        tasks=tuple(names),
        metrics=tuple(metrics),
        maximise=(maximise,) if isinstance(maximise, str) else tuple(maximise),
        learning_rates=rates,
        weightings=weights,
        single_task=single_task,
        values=values,
        selection=selection,
        losses=history[:, :, :seeds],
        min_cosines=cosines[:, :, :seeds],
        seconds=np.repeat(times, counts),
        num_steps=np.repeat(lengths[: len(found)], counts),
        rule=rule,
    )


class _Racer(NamedTuple):
    """Rows that one program trains."""

    names: list[str]  # Of the rows.
    weights: np.ndarray  # Of the losses, for each row; methods do not read them.
    init: Callable[..., Any]  # From parameters to a state.
    resolve: Callable[..., Any]  # (params, state, batch, weights) as value_and_grad.


class _Programs(NamedTuple):
    """What all racers share, compiled once, for several runs at a time."""

    init: Callable[..., Any]  # From seeds to parameters.
    cosine: Callable[..., Any]  # From parameters, seeds, step to the smallest cosines.
    measure: Callable[..., Any]  # From parameters to vectors of metrics.


def _trainer(racer, batch_fn, optimizer, programs, bounds):
    """Function of some settings to metrics, losses, cosines, and its seconds."""

    def advance(carry, start, end, rate, seed, weights):
        """The steps of one run from start to end, and the sum of their losses."""
        tx, key = optimizer(rate), _keys(seed)[1]

        def step(number, carry):
            params, state, opt_state, total = carry
            batch = batch_fn(key, number)
            losses, grads, state = racer.resolve(params, state, batch, weights)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, state, opt_state, total + stack_task_losses(losses)

        carry = *carry, jnp.zeros(len(weights))
        *carry, total = jax.lax.fori_loop(start, end, step, carry)
        return tuple(carry), total

    begin = lambda params, rate: (
        params,
        racer.init(params),
        optimizer(rate).init(params),
    )
    begin = jax.jit(jax.vmap(begin))
    advance = jax.jit(jax.vmap(advance, (0, None, None, 0, 0, 0)), donate_argnums=0)

    def train(rates, seeds, weights):
        carry = begin(programs.init(seeds), rates)
        # No step: compiles, so that the clock sees steps alone.
        carry, _ = advance(carry, bounds[0], bounds[0], rates, seeds, weights)
        history, seconds = [], 0.0
        for start, end in itertools.pairwise(bounds):
            cosine = programs.cosine(carry[0], seeds, start)
            jax.block_until_ready(cosine)  # The clock does not see it.
            began = time.perf_counter()
            carry, total = advance(carry, start, end, rates, seeds, weights)
            history.append((jax.device_get(total) / (end - start), cosine))
            seconds += time.perf_counter() - began
        curves = [np.stack(x, axis=1) for x in zip(*history)]
        return [*jax.device_get(programs.measure(carry[0])), *curves], seconds

    return train


def _keys(seed):
    """Keys of the parameters and of the batches of a run."""
    return jax.random.split(jax.random.key(seed))


def _in_chunks(train, settings, chunk):
    """Results of all settings, and the seconds of one."""
    count = len(settings[0])
    pieces = -(-count // chunk)
    order = np.arange(pieces * -(-count // pieces)) % count  # The last is filled up.
    parts = [[x[part] for x in settings] for part in np.split(order, pieces)]
    found, seconds = zip(*(train(*part) for part in parts))
    joined = [np.concatenate(x)[:count] for x in zip(*found)]
    return joined, sum(seconds) / len(order)


def _draw_weights(weightings, num_tasks):
    """Weights of the plain sum and the static weightings, which sum to T."""
    exponents = np.random.default_rng(0).uniform(-1, 1, (weightings, num_tasks))
    weights = 10 ** np.concatenate([np.zeros((1, num_tasks)), exponents])
    return weights * num_tasks / weights.sum(axis=1, keepdims=True)


def _weighted_sum(losses_fn):
    """(init, resolve) of the static weightings."""

    def total(params, batch, weights):
        losses = losses_fn(params, batch)
        return stack_task_losses(losses) @ weights, losses

    def resolve(params, state, batch, weights):
        grads, losses = jax.grad(total, has_aux=True)(params, batch, weights)
        return losses, grads, state

    return lambda params: (), resolve


def _method(resolve):
    """(init, resolve) of a method."""
    return resolve.init, lambda params, state, batch, _: resolve(params, state, batch)


def _factories(methods):
    """Functions of the number of tasks, by name."""
    if isinstance(methods, Mapping):
        factories = dict(methods)
    else:
        names = [methods] if isinstance(methods, str) else list(methods)
        factories = {x: lambda num_tasks, x=x: catalog.get(x, num_tasks) for x in names}
    for name, make in factories.items():
        arguments.check_function(f"methods[{name!r}]", make)
        if name == "sum" or name.startswith(("weighting ", "only ")):
            raise ValueError(
                f"{name!r} is in every race; give your method another name"
            )
    return factories


def _cosines(losses_fn, batch_fn, shared, num_tasks):
    """Program to the smallest cosine of the task gradients of shared parameters."""

    def watch(updates, state, params=None, **extra):
        return tasks.combine(jnp.ones(num_tasks), updates), tasks.gram(updates)

    init = lambda params: jnp.zeros((num_tasks, num_tasks))
    watcher = optax.GradientTransformationExtraArgs(init, watch)
    resolve = value_and_grad(losses_fn, watcher, shared=shared)

    def cosine(params, seed, number):
        batch = batch_fn(_keys(seed)[1], number)
        *_, gram = resolve(params, resolve.init(params), batch)
        return measures.conflicts(gram).min_cosine

    return jax.jit(jax.vmap(cosine, (0, 0, None)))


def _on_batches(losses_fn, batch_fn, names, number):
    """Losses averaged over batches that no run trains on, a function of parameters."""
    key = jax.random.fold_in(jax.random.key(2**31 - 1), number)

    def evaluate(params):
        one = lambda step: stack_task_losses(losses_fn(params, batch_fn(key, step)))
        return dict(zip(names, jax.lax.map(one, jnp.arange(HELD_OUT)).mean(axis=0)))

    return evaluate


def _as_vector(found, metrics):
    return jnp.stack([jnp.asarray(found[name], jnp.float32) for name in metrics])


def _names_of_metrics(name, function, params):
    """Names of the metrics that a function of the parameters returns."""
    found = jax.eval_shape(function, params)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"{name} should return a dict of scalars, but returned {found}"
        )
    for metric, value in found.items():
        if np.shape(value):
            raise ValueError(
                f"{name} should return scalars, but {metric!r} has shape"
                f" {value.shape}: average it, or return its entries by name"
            )
    return list(found)


def _flops(racer, params, batch, num_tasks):
    """Floating-point operations of the gradient of one step."""
    weights = jax.ShapeDtypeStruct((num_tasks,), jnp.float32)
    state = jax.eval_shape(racer.init, params)
    lowered = jax.jit(racer.resolve).lower(params, state, batch, weights)
    return max((lowered.compile().cost_analysis() or {}).get("flops", 1.0), 1.0)


def _bar(total):
    """A progress bar, if tqdm is installed and there is a total."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        tqdm = None
    if tqdm and total:
        return tqdm(total=total, unit="program")
    ignore = lambda *_: None
    return SimpleNamespace(set_description=ignore, update=ignore, close=ignore)
