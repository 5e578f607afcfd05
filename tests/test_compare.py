"""The race: what it runs, what it chooses, what it says."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import pyplot

import optax_mtl
from optax_mtl import plots

RATES = (0.003, 0.03)
NUM_STEPS, NUM_SEEDS = 25, 2
W = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)


def init_fn(key):
    one, two = jax.random.split(key)
    trunk = jax.random.normal(one, (4, 6)) / 2
    return {"trunk": trunk, "heads": jax.random.normal(two, (6, 2)) / 2}


def batch_fn(key, step):
    x = jax.random.normal(jax.random.fold_in(key, step), (16, 4))
    return x, x @ (W * np.float32([[1, 10]]))


def losses_fn(params, batch):
    x, y = batch
    error = jnp.tanh(x @ params["trunk"]) @ params["heads"] - y
    near, far = (error**2).mean(axis=0)
    return {"near": near, "far": far}


shared = lambda path: "trunk" in path
METHODS = {
    "upgrad": lambda _: optax_mtl.upgrad(),
    "plain": lambda _: optax_mtl.linear(),
}
race = functools.partial(
    optax_mtl.compare,
    losses_fn,
    init_fn,
    batch_fn,
    methods=METHODS,
    learning_rates=RATES,
    seeds=NUM_SEEDS,
    num_steps=NUM_STEPS,
    weightings=2,
    shared=shared,
    progress=False,
)


@functools.cache
def raced():
    return race(single_task=True)


def test_runs_equal_training_loops():
    """One after the other, by the calls that users make; to 2e-4 after 25 steps."""
    result = raced()
    key = jax.random.fold_in(jax.random.key(2**31 - 1), 0)
    resolve = optax_mtl.value_and_grad(losses_fn, optax_mtl.upgrad(), shared=shared)
    weights = jnp.asarray(result.weightings[1], jnp.float32)
    total = lambda params, batch: sum(
        w * x for w, x in zip(weights, optax_mtl.tasks.stack_losses(batch, None))
    )
    static = jax.grad(lambda p, b: total(p, losses_fn(p, b)))

    @functools.partial(jax.jit, static_argnames="by_method")
    def step(params, state, opt_state, rate, batch, by_method):
        if by_method:
            _, grads, state = resolve(params, state, batch)
        else:
            grads = static(params, batch)
        updates, opt_state = optax.adam(rate).update(grads, opt_state)
        return optax.apply_updates(params, updates), state, opt_state

    for row, by_method in (("upgrad", True), ("weighting 1", False)):
        for (i, rate), seed in itertools.product(enumerate(RATES), range(NUM_SEEDS)):
            init_key, data_key = jax.random.split(jax.random.key(seed))
            params = init_fn(init_key)
            state = resolve.init(params) if by_method else ()
            opt_state = optax.adam(rate).init(params)
            for number in range(NUM_STEPS):
                batch = batch_fn(data_key, number)
                params, state, opt_state = step(
                    params, state, opt_state, rate, batch, by_method
                )
            batches = [batch_fn(key, number) for number in range(10)]
            losses = [losses_fn(params, batch) for batch in batches]
            expected = {
                name: np.mean([float(x[name]) for x in losses])
                for name in result.metrics
            }
            found = result.values[result.methods.index(row), i, seed]
            np.testing.assert_allclose(found, list(expected.values()), rtol=2e-4)


def test_plain_sum_is_the_sum():
    result = raced()
    plain = result.methods.index("plain")
    np.testing.assert_allclose(result.values[plain], result.values[0], rtol=1e-4)
    np.testing.assert_allclose(result.losses[plain], result.losses[0], rtol=1e-4)
    assert result.weightings[0].tolist() == [1, 1]
    np.testing.assert_allclose(result.weightings.sum(axis=1), 2, rtol=1e-12)
    assert result.methods[:3] == ("sum", "weighting 1", "weighting 2")
    assert result.methods[3:5] == ("only far", "only near")
    assert result.racers() == [5, 6]


def test_single_tasks_train_one_task():
    """Alone, the other loss stays where heads and trunk happen to put it."""
    result = raced()
    near, far = (result.methods.index(f"only {x}") for x in ("near", "far"))
    names = [result.metrics.index(x) for x in ("near", "far")]
    worse = result.values[[far, near]][:, 1][..., names]
    better = result.values[[near, far]][:, 1][..., names]
    for i in range(2):
        assert np.all(better[i, :, i] < worse[i, :, i])


def test_history():
    result = raced()
    assert result.losses.shape == (7, 2, NUM_SEEDS, 20, 2)
    assert np.all(
        result.losses[0, 1, :, -1].sum(-1) < result.losses[0, 1, :, 0].sum(-1)
    )
    assert np.all(np.abs(result.min_cosines) <= 1)
    # At the first step, from the gradients of the trunk.
    init_key, data_key = jax.random.split(jax.random.key(1))
    params, batch = init_fn(init_key), batch_fn(data_key, 0)
    one = lambda name: jax.grad(
        lambda trunk: losses_fn({**params, "trunk": trunk}, batch)[name]
    )(params["trunk"])
    near, far = (np.ravel(one(name)) for name in ("near", "far"))
    cosine = near @ far / np.linalg.norm(near) / np.linalg.norm(far)
    np.testing.assert_allclose(result.min_cosines[:, 0, 1, 0], cosine, rtol=1e-4)


def test_chunks_do_not_change_the_result():
    some = race(methods={"upgrad": METHODS["upgrad"]}, chunk=3, weightings=0)
    row = raced().methods.index("upgrad")
    np.testing.assert_allclose(some.values[1], raced().values[row], rtol=2e-4)
    np.testing.assert_allclose(some.values[0], raced().values[0], rtol=2e-4)


def test_choice_is_made_on_other_seeds_or_another_split():
    evaluate = lambda params: {"size": jnp.abs(params["trunk"]).sum()}
    quick = functools.partial(race, methods=[], weightings=1, num_steps=2)
    result = quick(evaluate=evaluate, maximise="size")
    assert result.values.shape == result.selection.shape == (2, 2, NUM_SEEDS, 1)
    assert not np.any(result.values == result.selection)
    assert "2 seeds not reported" in result.verdict()
    other = quick(evaluate=evaluate, select=lambda p: {"size": -evaluate(p)["size"]})
    np.testing.assert_allclose(other.selection, -other.values)
    assert "split" in other.verdict()
    # The largest of what is selected, whatever is reported.
    best = np.argmax(result.selection.mean(axis=2)[..., 0], axis=1)
    worse = result._replace(values=-result.values)
    assert worse.chosen().tolist() == result.chosen().tolist() == best.tolist()


def test_equal_operations():
    """Two gradients and their projection cost more than one."""
    result = race(methods=["upgrad"], update_budget="flops", weightings=0)
    assert result.num_steps[0] == NUM_STEPS
    assert NUM_STEPS / 3 < result.num_steps[1] < NUM_STEPS


def test_divergence_is_a_result():
    result = race(
        methods=["mgda"],
        optimizer=optax.sgd,
        learning_rates=(0.01, 1e12),
        weightings=0,
    )
    assert np.isnan(result.values[:, 1]).all()
    assert np.isfinite(result.values[:, 0]).all()
    assert result.chosen().tolist() == [0, 0]
    assert "4 of 8 runs diverged" in result.verdict()
    lost = result._replace(
        values=np.full_like(result.values, np.nan),
        selection=np.full_like(result.values, np.nan),
    )
    assert "plain sum diverged" in lost.verdict()
    assert "nan" in lost.table()
    np.testing.assert_array_equal(lost.tuning_curve(), [np.nan])


def test_interrupt_keeps_what_is_finished():
    calls = itertools.count()

    def optimizer(rate):
        if next(calls) >= 2:  # Traced for its state and for its updates.
            raise KeyboardInterrupt
        return optax.adam(rate)

    result = race(optimizer=optimizer)
    assert result.methods == ("sum", "weighting 1", "weighting 2")
    assert np.isfinite(result.values).all()
    with pytest.raises(KeyboardInterrupt):
        race(optimizer=optimizer)


def made_up(changes, seeds=3):
    """A comparison whose reported metric is 100 + change, seed by seed."""
    names = ("sum", "weighting 1", *list(changes)[2:])
    values = np.array([np.broadcast_to(x, seeds) for x in changes.values()])
    values = (100 + values)[:, None, :, None]
    ones = np.ones(len(changes))
    return optax_mtl.Comparison(
        methods=names,
        tasks=("a", "b"),
        metrics=("error",),
        maximise=(),
        learning_rates=np.array([0.1]),
        weightings=np.array([[1.0, 1.0], [0.5, 1.5]]),
        single_task=False,
        values=values,
        selection=values,
        losses=np.ones((len(changes), 1, seeds, 4, 2)),
        min_cosines=np.tile([-0.5, 0.5], (len(changes), 1, seeds, 2)),
        seconds=0.001 * ones,
        num_steps=ones,
        rule="on a split of its own",
    )


def test_verdict():
    spread = np.array([-1.0, 0.0, 1.0])
    text = made_up({"sum": spread, "w": 5 + spread, "x": spread / 2}).verdict()
    assert "Keep the sum" in text
    assert "conflicted at 50 %" in text
    text = made_up({"sum": 0, "w": -4, "x": [-9, -8, -10], "y": 3}).verdict()
    assert "x is ahead of the tuned sum in every seed, by 5.00 ± 1" in text
    assert "Tuning pays: weights of 0.5, 1.5" in text
    assert "Behind the plain sum in every seed, beyond the spread: y." in text
    assert "Keep the sum" not in text
    text = made_up({"sum": 0, "w": [-4, -6, -5], "x": [-5, -4, -6]}).verdict()
    assert "x saves tuning" in text
    assert "Keep the sum" in text
    # Chosen by the selection, the tuned sum is behind the plain one, and so is "x".
    chosen = made_up({"sum": 0, "w": -4, "x": 0}).selection
    behind = made_up({"sum": spread, "w": 9 + spread, "x": 1 + spread})
    text = behind._replace(selection=chosen).verdict()
    assert "x is ahead" not in text
    assert "Keep the sum" in text and "Behind the plain sum" in text
    # Not in every seed; and in every seed, but by less than the spread.
    for close in ([-9, -9, 1], [-0.1, -0.1, -9]):
        text = made_up({"sum": 0, "w": 0, "x": close}).verdict()
        assert "ahead of the plain and the tuned" in text
        assert "x is ahead" not in text
    text = made_up({"sum": 0, "w": 1, "x": -50}, seeds=1).verdict()
    assert "One seed" in text
    assert "ahead" not in text


def test_tuning_curve_is_the_mean_over_all_choices():
    """Enumerated; of each choice and the sum counts what the selection puts first."""
    rng = np.random.default_rng(0)
    reported, selection = rng.normal(size=(2, 5, 1, 3, 1))
    result = made_up({"sum": 0, "a": 0, "b": 0, "c": 0, "x": 0})
    result = result._replace(
        values=100 + reported,
        selection=100 + selection,
        weightings=np.ones((4, 2)),
    )
    score, change = selection.mean((1, 2, 3)), result.delta_m().mean(axis=1)
    curve = [
        np.mean(
            [
                change[min((0, *chosen), key=lambda row: score[row])]
                for chosen in itertools.combinations((1, 2, 3), count)
            ]
        )
        for count in range(4)
    ]
    np.testing.assert_allclose(result.tuning_curve(), curve, atol=1e-12)
    needed = [count for count in range(4) if curve[count] <= change[4]]
    assert result.weightings_to_match(4) == min(needed, default=None)


def test_metric_that_is_zero():
    """It takes part in the choice, and the verdict says what is missing."""
    result = made_up({"sum": 0, "w": 0, "x": -9})
    values = result.values - 100
    values = np.concatenate([values + 1, values], axis=1)  # The second rate is better.
    result = result._replace(
        values=values, selection=values, learning_rates=np.array([0.1, 0.2])
    )
    assert result.chosen().tolist() == [1, 1, 1]
    assert "error of the plain sum is 0" in result.verdict()


def test_table():
    table = made_up({"sum": [-1, 0, 1], "w": 50, "x": [-2, -1, 0]}).table().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == [
        "sum",
        "tuned sum",
        "`x`",
    ]
    assert "| 99 ± 1 | -1.00 ± 1 | 1.0 | -1.00 -1.00 -1.00 | 50 |" in table[4]


BAD = {
    "seeds is 0": {"seeds": 0},
    "num_steps is 0": {"num_steps": 0},
    "weightings is -1": {"weightings": -1},
    "learning_rates is": {"learning_rates": [0.1, -1.0]},
    "the number of learning_rates is 0": {"learning_rates": []},
    "optimizer is": {"optimizer": optax.adam(0.1)},
    r"methods\['upgrad'\] is": {"methods": {"upgrad": optax_mtl.upgrad()}},
    "update_budget": {"update_budget": "time"},
    "conflicts": {"conflicts": "all"},
    "no method 'upgrade'; did you mean 'upgrad'": {"methods": ["upgrade"]},
    "'sum' is in every race": {"methods": {"sum": METHODS["plain"]}},
    "maximise names 'accuracy', but the metrics are far, near": {
        "maximise": "accuracy"
    },
    "evaluate should return scalars, but 'a' has shape": {
        "evaluate": lambda params: {"a": params["trunk"]}
    },
    "evaluate should return a dict": {"evaluate": lambda params: params["trunk"].sum()},
    "metrics of the same names": {"select": lambda params: {"a": 1.0}},
    "begin the chain with a method": {"methods": {"scale": lambda _: optax.scale(2.0)}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        race(**BAD[message])


def test_delta_m():
    """By hand: (-2.5 + 10) / 2 where accuracy rises by 2.5 % and error by 10 %."""
    found = optax_mtl.delta_m(
        {"accuracy": 0.82, "error": 2.2}, {"error": 2.0, "accuracy": 0.8}, ["accuracy"]
    )
    np.testing.assert_allclose(found, 3.75)
    # Of a negative baseline: -1 is worse than -2, by half.
    np.testing.assert_allclose(optax_mtl.delta_m({"x": -1.0}, {"x": -2.0}), 50)
    with pytest.raises(ValueError, match="same names"):
        optax_mtl.delta_m({"x": 1.0}, {"y": 1.0})
    with pytest.raises(ValueError, match="maximise names 'y'"):
        optax_mtl.delta_m({"x": 1.0}, {"x": 1.0}, ["y"])


def test_mean_rank():
    results = {
        "a": {"x": 1.0, "y": 5.0},
        "b": {"x": 2.0, "y": np.nan},
        "c": {"x": 2.0, "y": 7.0},
    }
    expected = {"a": 1.0, "b": (2.5 + 3) / 2, "c": (2.5 + 2) / 2}
    assert optax_mtl.mean_rank(results) == expected
    assert optax_mtl.mean_rank(results, ["y"])["c"] == (2.5 + 1) / 2
    with pytest.raises(ValueError, match="others"):
        optax_mtl.mean_rank({"a": {"x": 1.0}, "b": {"y": 1.0}})


@pytest.mark.parametrize("num_metrics", [1, 2, 3])
def test_hypervolume(num_metrics):
    """Counted cell by cell on a grid of integers."""
    rng = np.random.default_rng(num_metrics)
    for count in (0, 1, 5, 12):
        points = rng.integers(0, 8, (count, num_metrics))
        cells = np.indices((6,) * num_metrics).reshape(num_metrics, -1).T
        dominated = (points[None] <= cells[:, None]).all(axis=2).any(axis=1)
        volume = optax_mtl.hypervolume(points, [6] * num_metrics)
        assert volume == dominated.sum()
    with pytest.raises(ValueError, match="one to three"):
        optax_mtl.hypervolume(np.ones((2, 4)), np.ones(4))


def report(gram):
    return optax_mtl.conflicts(jnp.asarray(gram, jnp.float32))


def test_recommend():
    text = optax_mtl.recommend(report(np.eye(4)))
    assert text.startswith("Nothing to repair: the smallest cosine is 0.00")
    text = optax_mtl.recommend(report([[1, -0.5], [-0.5, 1]]))
    assert "smallest cosine is -0.50 and 100 % of the pairs" in text
    assert "upgrad" in text
    assert "Norms" not in text
    assert "With 2 tasks" in text
    text = optax_mtl.recommend(report([[100, 0], [0, 1]]))
    assert "factor of 10.0" in text
    assert "cosine" not in text
    text = optax_mtl.recommend(report(np.diag(np.arange(1, 21) ** 2)), 10**8)
    assert "20 tasks cost as many backward passes" in text
    assert "8.0 GB" in text
    assert "not finite" in optax_mtl.recommend(report([[np.nan, 0], [0, 1]]))
    assert "1 of the tasks" in optax_mtl.recommend(report([[0, 0], [0, 1]]))
    with pytest.raises(TypeError, match="report of one batch"):
        optax_mtl.recommend(jnp.eye(2))
    for name in ("upgrad", "cagrad", "imtl_l", "nash_mtl", "famo"):
        assert name in optax_mtl.METHODS


def test_figure():
    """It shows what the result holds; of a metric alone a line for each row."""
    result = raced()
    trade_off, sensitivity, conflict = plots.compare(result)
    labels = trade_off.get_legend_handles_labels()[1]
    assert labels == ["static weightings", "sum", "upgrad", "plain"]
    upgrad = sensitivity.get_lines()[1]
    np.testing.assert_array_equal(upgrad.get_xdata(), result.learning_rates)
    row = result.methods.index("upgrad")
    expected = result.delta_m()[row].mean()
    np.testing.assert_allclose(upgrad.get_ydata()[result.chosen()[row]], expected)
    assert len(conflict.get_lines()) == 4
    pyplot.close("all")
    alone, _, _ = plots.compare(made_up({"sum": 0, "w": -4, "x": -9}))
    assert [text.get_text() for text in alone.get_yticklabels()] == ["sum", "x"]
    assert alone.get_lines()[0].get_xdata().tolist() == [100, 96]
    pyplot.close("all")
    with pytest.raises(ValueError, match="three axes, got 2"):
        plots.compare(result, pyplot.subplots(1, 2)[1])
    pyplot.close("all")


def test_a_race_need_not_measure_conflict(monkeypatch):
    expected = raced().values[0]
    forbidden = lambda *_: pytest.fail("the gradients of all tasks")
    monkeypatch.setattr(sys.modules["optax_mtl.compare"], "_cosines", forbidden)
    result = race(methods={}, weightings=0, conflicts=False)
    assert np.isnan(result.min_cosines).all()
    assert "conflict" not in result.verdict()
    header, _, row = (line.split(" | ") for line in result.table().splitlines()[:3])
    assert row[header.index("conflict %")] == ""
    # Rounding differs with the number of runs in a program.
    np.testing.assert_allclose(result.values[0], expected, rtol=1e-5)
    pyplot.close(plots.compare(result)[0].figure)
