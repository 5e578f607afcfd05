"""Trains a masked autoencoder with several losses and one way to resolve them.

python -m examples.ssl.train --method gcond --mode stochastic
python -m examples.ssl.train --method sum --out runs/ssl-sum
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_mtl
from examples import arrays, runs
from examples.flags import UserError, run_program
from examples.progress import Speed, in_words, say, steps
from examples.ssl import config as config_lib
from examples.ssl import data, model, report
from examples.ssl.config import Config


class State(NamedTuple):
    """All that training changes."""

    params: Any
    statistics: Any  # Of batch norm.
    opt_state: Any


class Experiment(NamedTuple):
    """The functions of a run."""

    init: Callable[[Config], State]  # Reads the seed and the learning rate.
    step: Callable[..., tuple[State, dict[str, jax.Array]]]  # State and batch.
    evaluate: Callable[..., dict[str, jax.Array]]  # State and batch.
    reconstruct: Callable[..., Any]  # State and batch.
    place: Callable[[data.Batch], data.Batch]  # A batch on the devices.
    tasks: list[str]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains and writes logs, checkpoints and figures; returns the last validation."""
    config = config_lib.parse(arguments)
    model.num_masked(config)
    images = data.load(config)
    return run(config, images, make_experiment(config, images))


def run(
    config: Config, images: data.Images, experiment: Experiment
) -> dict[str, float]:
    """As :func:`main`, with an experiment that may have served other runs."""
    folder = pathlib.Path(config.out)
    with runs.open_checkpoints(folder) as saved:
        runs.check_settings(folder, config, saved.latest_step())
        start, state = runs.restore(saved, experiment.init(config))
        state, speed = fit(config, experiment, images, state, start, folder, saved)

    title = f"{config.method}, {config.mode}" if config.method != "sum" else "sum"
    report.plot_curves(folder, experiment.tasks, title)
    batch = next(data.validation(images, model.num_patches(config), config))
    seen, made, original = experiment.reconstruct(state, experiment.place(batch))
    pictures = {"seen": seen, "made": made, "original": original}
    report.plot_reconstructions(folder, pictures, title)
    results = validate(config, experiment, images, state) | speed
    encoder = [nnx.State(x.get("encoder", {})) for x in state[:2]]
    tensors = arrays.by_name(nnx.merge_state(*encoder))
    statistics = {"statistics": np.array(images.statistics())}
    arrays.save(folder / "encoder.npz", tensors | statistics)
    runs.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    say(in_words(results))
    return results


def make_experiment(config: Config, images: data.Images) -> Experiment:
    """Makes the functions of a run, compiled when they are first called."""
    replicated, split = _devices(config)
    num_tasks = 2 + (config.third_task != "none")
    tx = make_optimizer(config, num_tasks)
    make_model = model.maker(config, images)
    split_model = lambda seed: nnx.split(
        make_model(jax.random.key(seed)), nnx.Param, nnx.BatchStat, nnx.Variable
    )
    graph, params, statistics, rest = split_model(config.seed)
    train = not config.evaluation_mode

    def losses_fn(params, batch, statistics, train=train):
        network = nnx.merge(graph, params, statistics, rest, copy=True)
        losses = network.losses(batch, train)
        return losses, nnx.state(network, nnx.BatchStat)

    def weighted(params, batch, statistics):
        losses, statistics = losses_fn(params, batch, statistics)
        losses = {name: _weight(config, name) * loss for name, loss in losses.items()}
        if config.method == "sum":
            return {"sum": sum(losses.values())}, (losses, statistics)
        # Only the loss of its own task is computed on a micro-batch that serves one.
        aux = statistics if config.mode == "stochastic" else (losses, statistics)
        return losses, aux

    example = data.draw(images, 0, model.num_patches(config), config)
    example = jax.tree.map(lambda x: x[:1], example)
    tasks = sorted(jax.eval_shape(losses_fn, params, example, statistics)[0])
    stochastic = config.mode == "stochastic" and config.method != "sum"
    accumulate = optax_mtl.accumulate_task_grads(
        weighted, config.micro_batches, has_aux=True, one_task_each=stochastic
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        (losses, aux), updates = accumulate(
            state.params, batch, statistics=state.statistics
        )
        measured = {} if stochastic else jax.tree.map(lambda x: x.mean(0), aux[0])
        measured = {name: losses.get(name, measured.get(name)) for name in tasks}
        report = {name: x / _weight(config, name) for name, x in measured.items()}
        # The micro-batches start from the same statistics: the mean is their update.
        statistics = aux if stochastic else aux[1]
        statistics = jax.tree.map(lambda x: x.mean(0), statistics)
        resolved, opt_state = tx.update(
            updates, state.opt_state, state.params, losses=losses
        )
        arbitration = optax.tree.get(opt_state, "arbitration")
        if arbitration is not None:
            gram = arbitration.cosines  # GCond has measured them.
            report |= {"conflicts": arbitration.iterations}
            report |= {"winner": arbitration.winners[-1]}
        elif config.method != "sum":
            gram = optax_mtl.gram(updates)
        if config.method != "sum":
            report |= {"cosine": optax_mtl.conflicts(gram).min_cosine}
        params = optax.apply_updates(state.params, resolved)
        return State(params, statistics, opt_state), report

    @jax.jit
    def evaluate(state, batch):
        return losses_fn(state.params, batch, state.statistics, train=False)[0]

    @jax.jit
    def reconstruct(state, batch):
        network = nnx.merge(graph, state.params, state.statistics, rest, copy=True)
        return network.reconstruct(batch)

    def init(config):
        _, params, statistics, _ = split_model(config.seed)
        opt_state = jax.jit(make_optimizer(config, num_tasks).init)(params)
        return jax.device_put(State(params, statistics, opt_state), replicated)

    def place(batch):
        rows = split if len(batch.images) % split.mesh.size == 0 else replicated
        return jax.device_put(batch, data.Batch(rows, rows, rows, replicated))

    return Experiment(init, step, evaluate, reconstruct, place, tasks)


def make_optimizer(config: Config, num_tasks: int) -> optax.GradientTransformation:
    """The method, then momentum (the paper's integrated scheme), then AdamW."""
    if config.method == "sum":
        method = optax_mtl.linear()
    else:
        method = optax_mtl.get(config.method, num_tasks)
    rise_and_fall = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
    )

    # The peak is a number in the state: a search of it compiles once.
    @optax.inject_hyperparams
    def adamw(peak):
        least = config.final_learning_rate
        schedule = lambda step: least + (peak - least) * rise_and_fall(step)
        b1 = 0.0 if config.momentum else 0.9
        return optax.adamw(schedule, b1, b2=0.95, weight_decay=config.weight_decay)

    return optax.chain(
        method,
        optax.clip_by_global_norm(config.clip),
        optax.ema(config.momentum) if config.momentum else optax.identity(),
        adamw(config.learning_rate),
    )


def fit(
    config: Config,
    experiment: Experiment,
    images: data.Images,
    state: State,
    start: int,
    folder: pathlib.Path,
    saved: ocp.CheckpointManager,
) -> tuple[State, dict[str, float]]:
    """Trains from a step on; returns the state and images per second."""
    num_patches = model.num_patches(config)
    columns = ["step", *experiment.tasks, "cosine", "conflicts", "winner"]
    columns += [f"valid_{name}" for name in experiment.tasks]
    log = runs.Log(folder / "log.csv", columns, last=start)
    speed = Speed()
    with contextlib.ExitStack() as stack:
        board = None
        if config.tensorboard:
            board = runs.tensorboard(folder, start + 1)
            stack.enter_context(contextlib.closing(board))
        for step in steps(config, start):
            batch = data.draw(images, step, num_patches, config)
            batch = experiment.place(batch)
            with speed.step():
                state, measured = experiment.step(state, batch)
                row = {name: float(x) for name, x in measured.items()}  # Waits.
            if not np.isfinite(list(row.values())).all():
                raise FloatingPointError(f"step {step}: losses are not finite: {row}")
            if step % config.eval_every == 0 or step == config.steps:
                valid = validate(config, experiment, images, state)
                row |= {f"valid_{name}": x for name, x in valid.items()}
                say(f"step {step} of {config.steps}: {in_words(valid)}")
            log.write({"step": step} | row)
            if board:
                for name, x in row.items():
                    board.add_scalar(name, x, step)
            if step % config.eval_every == 0 or step == config.steps:
                runs.save(saved, step, state)
    return state, speed.report("images_per_second", config.batch_size)


def validate(
    config: Config, experiment: Experiment, images: data.Images, state: State
) -> dict[str, float]:
    """The loss of each task on validation images, without its weight."""
    batches = data.validation(images, model.num_patches(config), config)
    losses = [experiment.evaluate(state, experiment.place(b)) for b in batches]
    return {
        name: float(np.mean([loss[name] for loss in losses]))
        for name in experiment.tasks
    }


def _weight(config, task):
    weights = {"l1": config.l1_weight, "ssim": config.ssim_weight}
    return weights.get(task, config.third_weight)


def _devices(config):
    """How states and batches are placed on a mesh over the devices."""
    count = config.devices or jax.device_count()
    if count > jax.device_count():
        raise UserError(f"--devices {count}: there are only {jax.device_count()}")
    if config.batch_size % (count * config.micro_batches):
        raise UserError(
            f"--batch-size {config.batch_size} does not split into "
            f"--micro-batches {config.micro_batches} on {count} devices"
        )
    mesh = jax.make_mesh(
        (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    sharding = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    return sharding(), sharding("data")


if __name__ == "__main__":
    run_program(main)
