"""Three tasks on two overlaid digits: several methods beside the plain sum.

    make demo
    python -m examples.quickstart.train --methods linear upgrad --seeds 5

Takes one to three minutes on 2 CPU cores. The methods should read both digits at
about 97 % (MGDA at 89 %), as the sum does. PCGrad and UPGrad draw as well as the
sum, CAGrad, IMTL-G and Nash-MTL better by about 3 points: above the line of sums
with other weights.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optax_mtl
from examples.flags import run_program
from examples.progress import bar, say
from examples.quickstart import config, data, model, report
from optax_mtl import nnx as mtl_nnx


def resolve_trunk(method: optax.GradientTransformation) -> optax.GradientTransformation:
    """The method for the trunk; the heads have ordinary gradients already."""
    label = lambda path, _: "shared" if path[0].key == "trunk" else "heads"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    return optax.partition({"shared": method, "heads": optax.identity()}, labels)


def resolved_step(
    network: model.Model, optimizer: nnx.Optimizer, batch: data.Batch
) -> tuple[jax.Array, jax.Array]:
    """One step; returns the losses and the Gram matrix of the trunk's gradients."""
    trunk = nnx.PathContains("trunk")
    task_grads = mtl_nnx.value_and_task_grads(model.losses, shared=trunk)
    losses, grads = task_grads(network, batch)
    optimizer.update(network, grads, losses=losses)
    return losses, optax_mtl.gram(grads["trunk"])


def plain_step(
    network: model.Model, optimizer: nnx.Optimizer, batch: data.Batch
) -> jax.Array:
    """One step without a method: the gradient of the sum of the losses."""
    loss_fn = lambda network: model.losses(network, batch).sum()
    loss, grads = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, grads)
    return loss


class Compiled(NamedTuple):
    """A training step as a function of one state."""

    init: Callable[[int], nnx.State]  # From a seed.
    step: Callable[[nnx.State, data.Batch], tuple[nnx.State, Any]]


def compile_step(
    step_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    height: int,
    settings: config.Config,
) -> Compiled:
    """Makes the state explicit, so that all seeds share one compilation."""

    def build(seed):
        network = model.Model(height, settings.features, rngs=nnx.Rngs(seed))
        return network, nnx.Optimizer(network, tx, wrt=nnx.Param)

    graph = nnx.graphdef(build(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        network, optimizer = nnx.merge(graph, state)
        out = step_fn(network, optimizer, batch)
        return nnx.state((network, optimizer)), out

    return Compiled(lambda seed: nnx.state(build(seed)), step)


def train(
    compiled: Compiled,
    evaluate: Callable[[nnx.State], jax.Array],
    train_digits: data.Digits,
    seed: int,
    settings: config.Config,
    progress: tqdm,
) -> report.Run:
    """Trains with one method from one seed."""
    state, key = compiled.init(seed), jax.random.key(seed)
    measured, scores = [], [evaluate(state[0])]
    for step in range(1, settings.steps + 1):
        key, batch_key = jax.random.split(key)
        batch = data.sample(batch_key, train_digits, settings.batch_size)
        state, out = compiled.step(state, batch)
        measured.append(out)
        if step % settings.eval_every == 0:
            scores.append(evaluate(state[0]))
            progress.update(settings.eval_every)
    losses, gram = jax.device_get(jax.tree.map(lambda *x: np.stack(x), *measured))
    return report.Run(losses, gram, np.stack(scores))


def time_steps(
    compiled: dict[str, Compiled], batch: data.Batch, rounds: int = 50, repeats: int = 5
) -> dict[str, float]:
    """Best time per step, in seconds; all methods take turns on what may be busy."""
    states = {name: one.step(one.init(0), batch)[0] for name, one in compiled.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, one in compiled.items():
            jax.block_until_ready(states[name])
            start = time.perf_counter()
            for _ in range(repeats):
                states[name], _ = one.step(states[name], batch)
            jax.block_until_ready(states[name])
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: min(seconds) for name, seconds in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints the table and writes the figure."""
    settings = config.parse(arguments)
    train_digits, test_digits = data.load(settings.data)
    test = data.sample(jax.random.key(1234), test_digits, settings.test_size)
    height = test.images.shape[1]
    adamw = optax.adamw(settings.learning_rate)
    graph = nnx.graphdef(model.Model(height, settings.features, rngs=nnx.Rngs(0)))
    evaluate = jax.jit(lambda state: model.scores(nnx.merge(graph, state), test))

    methods = {
        name: optax_mtl.get(name, num_tasks=len(model.TASKS))
        for name in settings.methods
    }
    for weight in settings.draw_weights:
        methods[report.tuned(weight)] = optax_mtl.linear((1.0, 1.0, weight))
    compiled = {
        name: compile_step(
            resolved_step, optax.chain(resolve_trunk(method), adamw), height, settings
        )
        for name, method in methods.items()
    }
    runs: dict[str, list[report.Run]] = {name: [] for name in methods}
    total = len(methods) * settings.seeds * settings.steps
    with bar(total=total, unit="step") as progress:
        for name in methods:
            progress.set_description(name)
            for seed in range(settings.seeds):
                run = train(
                    compiled[name], evaluate, train_digits, seed, settings, progress
                )
                runs[name].append(run)
                scores = zip(model.TASKS, run.scores[-1])
                words = ", ".join(f"{task} {score:.1f} %" for task, score in scores)
                say(f"{report.label(name)}, seed {seed}: {words}")

    plain = {"plain": compile_step(plain_step, adamw, height, settings)}
    batch = data.sample(jax.random.key(0), train_digits, settings.batch_size)
    seconds = time_steps(plain | compiled, batch)
    print(report.table(runs, seconds))
    path = report.figure(runs, methods, settings)
    print(f"figure: {path}")


if __name__ == "__main__":
    run_program(main)
