"""Trains one network on many properties with one way to resolve their gradients.

python -m examples.molecules.train --data qm9.npz --method nash_mtl
python -m examples.molecules.train --data qm9.npz --method sum --out runs/qm9-sum
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_mtl
from examples import runs
from examples.flags import run_program
from examples.molecules import config as config_lib
from examples.molecules import data, model, report
from examples.molecules.config import Config
from examples.molecules.data import Molecules
from examples.progress import Speed, in_words, say, steps


class State(NamedTuple):
    """All that training changes."""

    params: Any
    resolved: Any  # The states of the method and of the optimizer.


class Experiment(NamedTuple):
    """The compiled functions of a run."""

    init: Callable[[], State]
    step: Callable[[State, int], tuple[State, jax.Array]]  # To the losses.
    conflict: Callable[[State, int], jax.Array]  # The smallest cosine of a step.
    valid: Callable[[State], jax.Array]  # Scores of the tasks.
    test: Callable[[State], jax.Array]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, writes logs, checkpoints and figures; returns the scores on the test."""
    config = config_lib.parse(arguments)
    molecules = data.load(config)
    say(molecules.about)
    experiment = make_experiment(config, molecules)
    folder = pathlib.Path(config.out)
    with runs.open_checkpoints(folder) as saved:
        runs.check_settings(folder, config, saved.latest_step())
        start, state = runs.restore(saved, experiment.init())
        state, speed = fit(config, experiment, molecules, state, start, folder, saved)

    scores = np.asarray(experiment.test(state))
    report.plot_curves(folder, molecules, config.method)
    report.plot_tasks(folder, molecules, scores, config.method)
    mean = {"mean": model.mean_score(molecules, scores)}
    results = _numbers(model.metrics(molecules, scores) | mean) | speed
    runs.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    say(f"test: {in_words(results)}")
    return results


def make_experiment(config: Config, molecules: Molecules) -> Experiment:
    """Makes the functions of a run, compiled when they are first called."""
    problem = model.make_problem(config, molecules)
    train, valid, test = (jax.device_put(rows) for rows in molecules[1:4])
    name = "linear" if config.method == "sum" else config.method
    resolve = optax_mtl.value_and_grad(
        problem.losses,
        optax_mtl.get(name, len(molecules.tasks)),
        shared=model.shared,
        optimizer=model.make_optimizer(config.steps)(config.learning_rate),
    )
    task_grads = optax_mtl.value_and_task_grads(problem.losses, shared=model.shared)
    weights, batches = jax.random.split(jax.random.key(config.seed))

    @jax.jit
    def init():
        params = problem.init(weights)
        return State(params, resolve.init(params))

    @jax.jit
    def step(state, number):
        batch = data.draw(train, batches, number, config.batch_size)
        losses, updates, resolved = resolve(state.params, state.resolved, batch)
        return State(optax.apply_updates(state.params, updates), resolved), losses

    @jax.jit
    def conflict(state, number):
        batch = data.draw(train, batches, number, config.batch_size)
        _, grads = task_grads(state.params, batch)
        gram = optax_mtl.gram(grads["trunk"])
        return optax_mtl.conflicts(gram).min_cosine

    score = jax.jit(lambda state, rows: problem.scores(state.params, rows))
    on = lambda rows: lambda state: score(state, rows)
    return Experiment(init, step, conflict, on(valid), on(test))


def fit(
    config: Config,
    experiment: Experiment,
    molecules: Molecules,
    state: State,
    start: int,
    folder: pathlib.Path,
    saved: ocp.CheckpointManager,
) -> tuple[State, dict[str, float]]:
    """Trains from a step on; returns the state and rows per second."""
    log = runs.Log(folder / "log.csv", report.columns(molecules), last=start)
    speed = Speed()
    for step in steps(config, start):
        reported = step % config.eval_every == 0 or step == config.steps
        cosine = {"cosine": float(experiment.conflict(state, step))} if reported else {}
        with speed.step():
            state, losses = experiment.step(state, step)
            row = _numbers(model.named(molecules, losses) | cosine)  # Waits.
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"step {step}: losses are not finite: {row}")
        if reported:
            scores = experiment.valid(state)
            valid = _numbers(model.metrics(molecules, scores))
            mean = float(model.mean_score(molecules, scores))
            row |= {f"valid_{name}": x for name, x in valid.items()}
            row |= {"valid_mean": mean}
            say(f"step {step} of {config.steps}: {in_words(valid | {'mean': mean})}")
        log.write({"step": step} | row)
        if reported:
            runs.save(saved, step, state)
    return state, speed.report("rows_per_second", config.batch_size)


def _numbers(values):
    return {name: float(x) for name, x in values.items()}


if __name__ == "__main__":
    run_program(main)
