"""Physics-informed networks: solutions, losses, gradients, runs, in miniature."""

import csv
import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_mtl
from examples.pinn import config as config_lib
from examples.pinn import model, problems, race, train
from examples.pinn.config import Setup
from examples.pinn.problems import PROBLEMS
from tests.common import compiled_fast

TINY = {"points": 12, "side_points": 4, "width": 5, "depth": 1}
SMALL = [f"--{name.replace('_', '-')}={x}" for name, x in TINY.items()]
SMALL += ["--steps", "4", "--eval-every", "2"]
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


def points_of(problem, count=200):
    return problems.draw(PROBLEMS[problem], jax.random.key(0), count, count // 4)


# Solutions


def test_the_solution_of_burgers_satisfies_the_equation():
    rng = np.random.default_rng(0)
    x, t = rng.uniform(-1, 1, 500), rng.uniform(0.05, 0.95, 500)
    x[:100] /= 50  # In the shock.
    u = lambda dx, dt: problems.burgers_solution(np.stack([x + dx, t + dt], 1))[:, 0]
    h = 2e-4  # Differences of fourth order, in float64.
    slope = lambda f: (f(-2 * h) - 8 * f(-h) + 8 * f(h) - f(2 * h)) / (12 * h)
    near, far = u(h, 0) + u(-h, 0), u(2 * h, 0) + u(-2 * h, 0)
    u_xx = (16 * near - far - 30 * u(0, 0)) / (12 * h**2)
    advection = u(0, 0) * slope(lambda d: u(d, 0))
    friction = 0.01 / np.pi * u_xx
    residual = slope(lambda d: u(0, d)) + advection - friction
    size = np.abs(friction).max()
    assert size > 10  # There is a shock to get right.
    assert np.abs(residual).max() < 1e-4 * size


def test_the_solution_of_burgers_starts_as_a_sine_and_is_zero_at_the_ends():
    x = np.linspace(-1, 1, 41)
    at = lambda x, t: problems.burgers_solution(np.stack([x, np.full_like(x, t)], 1))
    np.testing.assert_allclose(at(x, 0)[:, 0], -np.sin(np.pi * x), atol=1e-14)
    assert np.abs(at(x, 1e-9)[:, 0] + np.sin(np.pi * x)).max() < 1e-7
    for t in (0.1, 0.5, 1):
        assert np.abs(at(np.array([-1.0, 0, 1]), t)).max() < 1e-13
    grid = problems.make_grid(PROBLEMS["burgers"])
    more = problems.burgers_solution(grid, nodes=200)
    np.testing.assert_allclose(problems.burgers_solution(grid), more, atol=1e-6)


@pytest.mark.parametrize("problem", ["kovasznay", "helmholtz"])
def test_exact_solutions_have_no_loss_and_others_do(problem):
    it = PROBLEMS[problem]
    with jax.enable_x64(True):
        points = {k: jnp.asarray(x, float) for k, x in points_of(problem).items()}
        off = lambda x: it.solution(x) + 0.01 * jnp.sin(x.sum(1, keepdims=True) + 0.1)
        losses = compiled_fast(
            lambda points: [it.losses(f, points) for f in (it.solution, off)]
        )
        exact, other = jax.device_get(losses(points))
    assert sorted(exact) == it.tasks
    for name in exact:
        assert exact[name] < 1e-20
        assert other[name] > 1e-6


def test_a_shock_wave_has_no_loss_in_the_equation_of_burgers():
    # u = c - a tanh(a (x - c t) / (2 viscosity)), exact on the whole line.
    points = points_of("burgers")
    wave = lambda a, c, points: (
        c
        - a
        * jnp.tanh(a * (points[:, :1] - c * points[:, 1:]) / (2 * problems.VISCOSITY))
    )
    networks = (
        partial(wave, 0.5, 0.3),
        lambda x: wave(0.5, 0, x) + 0.3,  # Does not move.
        lambda x: -jnp.sin(np.pi * x[:, :1]),
    )
    with jax.enable_x64(True):
        points = {k: jnp.asarray(x, float) for k, x in points.items()}
        points["inside"] = points["inside"] * 0.05
        losses = compiled_fast(
            lambda points: [PROBLEMS["burgers"].losses(f, points) for f in networks]
        )
        exact, still, sine = jax.device_get(losses(points))
    assert exact["equation"] < 1e-20 and still["equation"] > 1
    assert sine["start"] < 1e-20 and sine["boundary"] < 1e-20
    assert exact["start"] > 0.1 and exact["boundary"] > 0.1


@every_problem
def test_points_lie_inside_and_on_the_sides(problem):
    it, points = PROBLEMS[problem], points_of(problem)
    assert points.keys() == {"inside", *it.sides}
    for name, x in points.items():
        assert (x >= jnp.array([it.low])).all() and (x <= jnp.array([it.high])).all()
        spread = x.max(axis=0) - x.min(axis=0)
        size = np.subtract(it.high, it.low)
        if name != "inside":
            axis, end = it.sides[name]
            assert (x[:, axis] == end).all() and end in (it.low[axis], it.high[axis])
            size[axis] = 0
        np.testing.assert_array_less(0.8 * size - 1e-9, spread)


# Gradients


@every_problem
def test_second_derivatives_through_every_way_of_getting_gradients(problem):
    """The update of each way is that of the stacked gradients and the method."""
    functions = model.make(Setup(problem=problem, **TINY))
    params = functions.init(jax.random.key(0))
    points = functions.draw(jax.random.key(1), 0)
    num_tasks = len(jax.eval_shape(functions.losses, params, points))
    by_gram, by_losses, by_gradients = (
        optax_mtl.get(name, num_tasks)
        for name in ("imtl_g", "uncertainty_weighting", "coordinate_median")
    )
    ways = {
        "stacked": [by_gram, by_losses, by_gradients],
        "auto": [by_gram],
        "leafwise": [by_gram, by_losses],
        "gram": [by_gram],  # One that reads losses has one pass in every mode.
    }

    @compiled_fast
    def update_all_ways(params, points):
        task_grads = optax_mtl.value_and_task_grads(functions.losses)
        losses, updates = task_grads(params, points)
        expected = [
            method.update(updates, method.init(params), losses=losses)[0]
            for method in ways["stacked"]
        ]
        resolved = {}
        for mode, methods in ways.items():
            makers = [
                optax_mtl.value_and_grad(functions.losses, method, mode=mode)
                for method in methods
            ]
            resolved[mode] = [f(params, f.init(params), points)[1] for f in makers]
        return expected, resolved

    expected, resolved = update_all_ways(params, points)
    for updates in resolved.values():
        for update, other in zip(updates, expected):
            assert_close(update, other)


def assert_close(tree, other):
    difference = optax.tree.norm(optax.tree.sub(tree, other))
    assert difference <= 1e-4 * optax.tree.norm(other)


# Runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Flags and folder of a run."""
    folder = tmp_path_factory.mktemp("pinn") / "whole"
    flags = [*SMALL, "--problem", "burgers", "--method", "imtl_g"]
    train.main([*flags, "--out", str(folder)])
    return flags, folder


def rows_of(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder, step):
    place = folder / "checkpoints" / str(step) / "default"
    return ocp.StandardCheckpointer().restore(place.absolute())


def test_what_a_run_leaves(whole):
    _, folder = whole
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {"error_u", "steps_per_second"}
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["error_u"]) == pytest.approx(results["error_u"])
    assert rows[1]["cosine"] and not rows[0]["cosine"]
    for name in ("curves.png", "solution.png"):
        assert (folder / name).stat().st_size > 10_000


def test_resumes_bit_for_bit(whole, tmp_path):
    flags, folder = whole
    out = tmp_path / "run"
    flags = [*flags, "--out", str(out)]
    shutil.copytree(folder, out)  # As a kill before the last checkpoint leaves it.
    shutil.rmtree(out / "checkpoints" / "4")
    with pytest.raises(FileExistsError, match="checkpoint 2: continue it"):
        train.main(flags)
    with pytest.raises(ValueError, match="problem 'burgers', not 'helmholtz'"):
        train.main([*flags, "--resume", "--problem", "helmholtz"])
    train.main([*flags, "--resume"])
    assert rows_of(out) == rows_of(folder)
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint(out, 4), checkpoint(folder, 4)
    )


def test_weights_by_hand_are_those_of_the_sum():
    flags = [*SMALL, "--problem", "burgers", "--method", "sum"]
    config = config_lib.parse([*flags, "--boundary-weight", "10"])
    experiment = train.make_experiment(config)
    functions = model.make(config)
    state = experiment.init()
    points = functions.draw(jax.random.key(config.seed), 1)

    def total(params):
        losses = functions.losses(params, points)
        return losses["equation"] + 10 * (losses["boundary"] + losses["start"])

    expected = compiled_fast(jax.grad(total))(state.params)
    state, _ = experiment.step(state, 1)
    first_moment = optax.tree.get(state.opt_state, "mu")
    assert_close(jax.tree.map(lambda x: 10 * x, first_moment), expected)


def test_a_race_on_two_halves_of_the_grid(tmp_path, capsys):
    flags = [*SMALL[:4], "--steps", "3", "--problem", "helmholtz", "--seeds", "2"]
    flags += ["--methods", "--boundary-weights", "10", "--weightings", "1"]
    flags += ["--learning-rates", "0.01", "0.02", "--out", str(tmp_path)]
    result = race.main(flags)
    printed = capsys.readouterr().out
    assert result.table() in printed and result.verdict() in printed
    assert (tmp_path / "race-helmholtz.png").stat().st_size > 10_000
    assert result.methods == ("sum", "weighting 1", "sides x 10")
    assert result.metrics == ("error_u",) and result.rule == "on a split of its own"
    assert result.values.shape == result.selection.shape == (3, 2, 2, 1)
    # Neighbours of each other, the halves tell almost the same, but not the same.
    np.testing.assert_allclose(result.values, result.selection, rtol=0.02)
    assert (result.values != result.selection).all()


def test_options_of_a_race_are_those_of_compare(monkeypatch):
    found = {}
    ignore = lambda *functions, **options: found.update(options)
    monkeypatch.setattr(optax_mtl, "compare", ignore)
    options = {"num_steps": 3, "seeds": 5, "select": None}
    race.race(Setup(problem="helmholtz", steps=9, **TINY), ["mgda"], **options)
    assert options.items() <= found.items() and found["learning_rates"] == race.RATES
    optimizer = found["optimizer"](0.1)
    state, sizes = optimizer.init(np.zeros(1)), []
    for _ in range(4):
        update, state = optimizer.update(np.ones(1, np.float32), state)
        sizes.append(abs(update[0]))
    # The cosine ends with the race, not with the steps of the configuration.
    np.testing.assert_allclose(sizes, [0.1, 0.075, 0.025, 0], rtol=1e-4, atol=1e-7)


def test_how_many_weightings_a_method_saves():
    change = np.array([0, -40, 10, -10, -30, 5, -60])  # In percent.
    result = SimpleNamespace(
        delta_m=lambda: change[:, None],
        weightings=np.ones((4, 2)),
        weightings_to_match={4: 3, 5: 0, 6: None}.get,
        methods=("sum", *"abc", "upgrad", "mgda", "pcgrad"),
        racers=lambda: [4, 5, 6],
    )
    assert race.weightings_saved(result) == [
        "upgrad: as good as the best of the plain sum and 3 others",
        "mgda: no better than the plain sum",
        "pcgrad: better than the plain sum and 3 others",
    ]
    result.delta_m = lambda: np.full((7, 1), np.nan)
    assert "diverged" in race.weightings_saved(result)[0]


def test_a_race_needs_a_rate(capsys):
    with pytest.raises(SystemExit):
        race.main(["--learning-rates"])
    assert "--learning-rates: give at least one" in capsys.readouterr().err
