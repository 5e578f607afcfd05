"""What resolving conflicts with GCond costs.

    python -m benchmarks.gcond

times one update of `gcond` against the two passes over memory that nothing can do
without: read the gradients of all tasks and the last ones to measure them, read the
gradients again and write one update. All are timed by turns in one run.

    python -m benchmarks.gcond --training
    python -m benchmarks.gcond --training --flags="--batch-size 256 --micro-batches 8"

times steps of examples/ssl on the plain sum, with GCond in stochastic mode (one task
per micro-batch) and with several methods in exact mode, and prints the compiler's
temporary memory. On a CPU the times are those that the process computed, so that
others on the machine do not count.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from optax_mtl import tasks
from optax_mtl.methods.conflict.gcond import gcond


def make_updates(num_tasks: int, num_params: int, num_leaves: int) -> dict:
    """Random task gradients that conflict, in leaves of equal size."""
    keys = jax.random.split(jax.random.key(0), num_leaves)
    shape = (num_tasks, num_params // num_leaves)
    common = jax.random.normal(jax.random.key(1), shape[1:])
    signs = jnp.where(jnp.arange(num_tasks) % 2, 1.0, -1.0)[:, None]
    make = lambda key: jax.random.normal(key, shape) + signs * common
    return {f"leaf{i}": make(key) for i, key in enumerate(keys)}


def lower_bound(updates: dict, previous: dict) -> tuple[jax.Array, dict]:
    """Reads everything once, then the gradients again, and writes one update."""
    read = lambda x, p: jnp.sum(x * p)
    total = sum(jax.tree.leaves(jax.tree.map(read, updates, previous)))
    weights = total * jnp.ones(len(jax.tree.leaves(updates)[0]))
    return total, tasks.combine(weights, updates)


def compare(
    functions: dict, yardstick: str, repeats: int
) -> dict[str, tuple[float, float]]:
    """Shortest time of each function, in seconds, and how often the yardstick's it is.

    All are called by turns; the ratio is the median of those within one turn.
    """
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            if turn:  # The first compiles.
                times[name].append(clock() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(mine, times[yardstick]))
        for name, mine in times.items()
    }
    return {name: (min(mine), ratios[name]) for name, mine in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--params", type=int, default=4_000_000)
    parser.add_argument("--leaves", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--flags", default="", help="of the example, for --training")
    args = parser.parse_args(argv)
    if args.training:
        return compare_training(args.repeats, args.flags.split())

    print(f"{args.params:,} parameters in {args.leaves} leaves on {jax.devices()[0]}")
    print("| tasks | method | ms | x the two passes |")
    print("| --- | --- | --- | --- |")
    for num_tasks in args.tasks:
        updates = make_updates(num_tasks, args.params, args.leaves)
        params = jax.tree.map(lambda x: x[0], updates)
        functions = {}
        for reference in ("accumulated", "resolved"):
            method = gcond(num_tasks, reference=reference)
            functions[f"gcond, {reference}"] = make_step(method, params, updates)
        previous = jax.tree.map(jnp.negative, updates)
        functions["two passes"] = partial(jax.jit(lower_bound), updates, previous)
        times = compare(functions, "two passes", args.repeats)
        for name, (seconds, ratio) in times.items():
            print(f"| {num_tasks} | {name} | {1e3 * seconds:.1f} | {ratio:.2f} |")


def compare_training(repeats: int, more: list[str]) -> None:
    """Steps of the self-supervised example: the same model, several ways."""
    from examples.ssl import config, data, measure, model, train

    functions, memory = {}, {}
    for name, flags in measure.ROWS.items():
        options = config.parse([*flags.split(), *more, "--devices", "1"])
        images = data.load(options)
        experiment = train.make_experiment(options, images)
        batch = data.draw(images, 1, model.num_patches(options), options)
        batch, state = experiment.place(batch), experiment.init(options)
        step = experiment.step.lower(state, batch).compile()
        memory[name] = step.memory_analysis().temp_size_in_bytes / 1e6
        functions[name] = _repeated(step, state, batch)
    times = compare(functions, measure.YARDSTICK, repeats)
    print(f"Steps of {options.batch_size} images in {options.micro_batches} parts")
    print("| training | images/s | throughput / sum's | temporary MB |")
    print("| --- | --- | --- | --- |")
    for name, (seconds, ratio) in times.items():
        print(
            f"| {name} | {options.batch_size / seconds:.0f} "
            f"| {1 / ratio:.2f} | {memory[name]:.0f} |"
        )


def _repeated(step, state, batch):
    def call():
        nonlocal state
        state, measured = step(state, batch)
        return measured

    return call


def make_step(method, params, updates):
    """One update, its state donated as in a training step."""
    update = jax.jit(method.update, donate_argnums=1)
    state = jax.jit(method.init)(params)

    def step():
        nonlocal state
        out, state = update(updates, state)
        return out, state

    return step


if __name__ == "__main__":
    main()
