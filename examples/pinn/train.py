"""Trains a physics-informed network, its losses resolved by one method.

python -m examples.pinn.train --problem burgers --method upgrad
python -m examples.pinn.train --method sum --boundary-weight 10 --out runs/pinn-sum
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_mtl
from examples import runs
from examples.flags import run_program
from examples.pinn import config as config_lib
from examples.pinn import model, problems, report
from examples.pinn.config import Config
from examples.progress import Speed, in_words, say, steps


class State(NamedTuple):
    """All that training changes."""

    params: Any
    opt_state: Any  # Of the method, and of Adam.


class Experiment(NamedTuple):
    """The functions of a run."""

    init: Callable[[], State]
    step: Callable[..., tuple[State, dict[str, jax.Array]]]  # State, number: losses.
    evaluate: Callable[..., dict[str, jax.Array]]  # State, number: errors, cosine.
    predict: Callable[[State], jax.Array]  # Outputs on the grid.


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains and writes logs, checkpoints and figures; returns the last errors."""
    config = config_lib.parse(arguments)
    experiment = make_experiment(config)
    folder = pathlib.Path(config.out)
    with runs.open_checkpoints(folder) as saved:
        runs.check_settings(folder, config, saved.latest_step())
        start, state = runs.restore(saved, experiment.init())
        state, speed = fit(config, experiment, state, start, folder, saved)

    problem = problems.PROBLEMS[config.problem]
    title = f"{config.problem}, {describe(config)}"
    report.plot_curves(folder, problem, title)
    report.plot_solution(folder, problem, experiment.predict(state), title)
    last = experiment.evaluate(state, config.steps)
    errors = {name: float(x) for name, x in last.items() if name != "cosine"}
    results = errors | speed
    runs.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    say(in_words(results))
    return results


def make_experiment(config: Config) -> Experiment:
    """Makes the functions of a run, compiled when they are first called."""
    problem = problems.PROBLEMS[config.problem]
    functions = model.make(config)
    weights = problem.weights(config.boundary_weight)
    grid = problems.make_grid(problem)
    errors = model.errors(config, functions, grid)
    points_of = lambda number: functions.draw(jax.random.key(config.seed), number)

    def losses_fn(params, points):
        losses = functions.losses(params, points)
        return {name: weights[name] * x for name, x in losses.items()}, losses

    # From a key that no step has.
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
    params = functions.init(key)
    if config.method == "sum":
        method = optax_mtl.linear()
    else:
        method = optax_mtl.get(config.method, len(problem.tasks))
    resolve = optax_mtl.value_and_grad(
        losses_fn,
        method,
        has_aux=True,
        mode=config.mode,
        optimizer=functions.optimizer(config.learning_rate),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, number):
        (_, losses), updates, opt_state = resolve(*state, points_of(number))
        return State(optax.apply_updates(state.params, updates), opt_state), losses

    @jax.jit
    def evaluate(state, number):
        task_grads = optax_mtl.value_and_task_grads(losses_fn, has_aux=True)
        _, updates = task_grads(state.params, points_of(number))
        cosine = optax_mtl.conflicts(optax_mtl.gram(updates)).min_cosine
        return errors(state.params) | {"cosine": cosine}

    return Experiment(
        init=jax.jit(lambda: State(params, resolve.init(params))),  # Copies.
        step=step,
        evaluate=evaluate,
        predict=jax.jit(
            lambda state: functions.predict(state.params, jnp.asarray(grid))
        ),
    )


def fit(
    config: Config,
    experiment: Experiment,
    state: State,
    start: int,
    folder: pathlib.Path,
    saved: ocp.CheckpointManager,
) -> tuple[State, dict[str, float]]:
    """Trains from a step on; returns the state and steps per second."""
    problem = problems.PROBLEMS[config.problem]
    columns = ["step", *problem.tasks, "cosine"]
    columns += [f"error_{name}" for name in problem.outputs]
    log = runs.Log(folder / "log.csv", columns, last=start)
    speed = Speed()
    for step in steps(config, start):
        with speed.step():
            state, losses = experiment.step(state, step)
            row = {name: float(x) for name, x in losses.items()}  # Waits.
        if not np.isfinite(list(row.values())).all():
            raise FloatingPointError(f"step {step}: losses are not finite: {row}")
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            measured = experiment.evaluate(state, step)
            row |= {name: float(x) for name, x in measured.items()}
            say(f"step {step} of {config.steps}: {in_words(row)}")
        log.write({"step": step} | row)
        if due:
            runs.save(saved, step, state)
    return state, speed.report("steps_per_second")


def describe(config: Config) -> str:
    """The method, and the weight that was given by hand."""
    if config.boundary_weight == 1:
        return config.method
    return f"{config.method}, sides x {config.boundary_weight:g}"


if __name__ == "__main__":
    run_program(main)
