"""What the ways to resolve task gradients cost, against the plain sum of the losses.

    python -m benchmarks.gradients                # 3 models, T = 2 to 32, some minutes
    python -m benchmarks.gradients --models mlp --tasks 4 16
    python -m benchmarks.gradients --clock cpu    # On a machine shared with others

Times whole training steps (gradients, method, AdamW) by turns in one run and prints
them as multiples of the plain sum's step; memory is the temporary memory of the
compiled step, by the compiler. Writes benchmarks/gradients.png.
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optax_mtl

FIGURE = pathlib.Path(__file__).with_suffix(".png")
OUTPUTS = 8  # Of each head.
PER_TASK = {"K = T": 1, "K = 4T": 4}  # Micro-batches, as multiples of T.
MAX_TASKS_EACH = 8  # One task each compiles a program for each task.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TICKS = (1, 3, 10, 30, 100, 300, 1000)
DRAWN = {  # The ways in the figure: those between which one chooses.
    "plain sum": {"color": "0.5", "ls": "--"},
    "stacked": {"color": "tab:blue"},
    "leafwise": {"color": "tab:orange"},
    "Gram only": {"color": "tab:green"},
    "Gram only, jax.checkpoint": {"color": "tab:green", "ls": ":"},
    "at features": {"color": "tab:red"},
}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(6):
            x = nn.gelu(nn.Dense(384)(x))
        return x


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(128, (4, 4), (4, 4))(x)
        x = x.reshape(len(x), -1, 128)
        x += self.param("position", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(4)(y, y)
            y = nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))
            x += nn.Dense(128)(y)
        return nn.LayerNorm()(x).mean(axis=1)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (32, 64, 128):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.relu(nn.Conv(features, (3, 3), (2, 2))(x))
        return x.mean(axis=(1, 2))


class Heads(nn.Module):
    num_tasks: int

    @nn.compact
    def __call__(self, z):
        return {f"{i:02}": nn.Dense(OUTPUTS)(z) for i in range(self.num_tasks)}


MODELS = {"mlp": (MLP(), 256), "vit": (ViT(), 32), "convnet": (ConvNet(), 32)}


def make_problem(trunk, batch_size, num_tasks):
    """Parameters, a batch, and the functions of trunk and heads."""
    heads = Heads(num_tasks)
    x = jax.random.normal(jax.random.key(0), (batch_size, 16, 16, 3))
    y = jax.random.normal(jax.random.key(1), (batch_size, num_tasks, OUTPUTS))
    keys = jax.random.split(jax.random.key(2))
    features, trunk_params = jax.jit(trunk.init_with_output)(keys[0], x)
    params = {"trunk": trunk_params, "heads": jax.jit(heads.init)(keys[1], features)}

    def trunk_fn(params, x, y):
        return trunk.apply(params["trunk"], x)

    def heads_fn(params, z, x, y):
        outputs = heads.apply(params["heads"], z)
        return {
            name: jnp.mean((output - y[:, i]) ** 2)
            for i, (name, output) in enumerate(sorted(outputs.items()))
        }

    return params, (x, y), trunk_fn, heads_fn


def make_steps(num_tasks, trunk_fn, heads_fn, tx):
    """Training steps, each a function of the parameters, the state and a batch."""

    def losses_fn(params, x, y):
        return heads_fn(params, trunk_fn(params, x, y), x, y)

    sum_fn = lambda *args: sum(losses_fn(*args).values())
    shared = {"trunk": True, "heads": False}
    by_gram, by_losses = optax_mtl.pcgrad(), optax_mtl.dwa(num_tasks)
    labels = {"trunk": "trunk", "heads": "heads"}

    def then_resolve(task_grads):
        routes = {"trunk": by_gram, "heads": optax.identity()}
        method = optax.partition(routes, labels)

        def fn(params, state, *batch):
            losses, updates = task_grads(params, *batch)
            grads, state = method.update(updates, state, params, losses=losses)
            return losses, grads, state

        return fn, method

    def stacked(**kwargs):
        return then_resolve(
            optax_mtl.value_and_task_grads(losses_fn, shared=shared, **kwargs)
        )

    def resolved(losses_fn, method, **kwargs):
        fn = optax_mtl.value_and_grad(losses_fn, method, shared=shared, **kwargs)
        return fn, fn

    def plain(params, state, *batch):
        loss, grads = jax.value_and_grad(sum_fn)(params, *batch)
        return loss, grads, state

    def plain_accumulated(count, params, state, *batch):
        def add(total, batch):
            loss, grads = jax.value_and_grad(sum_fn)(params, *batch)
            add = lambda t, g: t + g / count
            return jax.tree.map(add, total, grads), loss

        split = lambda x: x.reshape(count, -1, *x.shape[1:])
        zeros = optax.tree.zeros_like(params)
        grads, losses = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
        return losses.mean(), grads, state

    ways = {
        "plain sum": (plain, optax.identity()),
        "stacked": stacked(),
        "stacked, sequential": stacked(sequential=True),
        "leafwise": resolved(losses_fn, by_gram, mode="leafwise"),
        "auto": resolved(losses_fn, by_gram),
        "Gram only": resolved(losses_fn, by_gram, mode="gram"),
        "Gram only, jax.checkpoint": resolved(
            jax.checkpoint(losses_fn), by_gram, mode="gram"
        ),
        "at features": (
            optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, by_gram),
            by_gram,  # Without a state that would have the size of the features.
        ),
        "losses only": resolved(losses_fn, by_losses),
    }
    if num_tasks <= MAX_TASKS_EACH:
        for name, per_task in PER_TASK.items():
            count = per_task * num_tasks
            accumulate = functools.partial(plain_accumulated, count)
            ways[f"{name}, plain sum"] = (accumulate, optax.identity())
            one_task_each = optax_mtl.accumulate_task_grads(
                losses_fn, count, shared=shared, one_task_each=True
            )
            ways[f"{name}, one task each"] = then_resolve(one_task_each)
    return {name: make_step(*way, tx) for name, way in ways.items()}


def make_step(resolve, start, tx):
    """A step, and its first state by ``start.init`` and ``tx.init``."""

    def step(params, state, *batch):
        losses, grads, method_state = resolve(params, state[0], *batch)
        updates, tx_state = tx.update(grads, state[1], params)
        params = optax_mtl.apply_updates(params, updates)
        return params, (method_state, tx_state), losses

    init = lambda params: (start.init(params), tx.init(params))
    return jax.jit(step), init


def group_of(way):
    """The first part of the name of a way, a key of PER_TASK if it accumulates."""
    return way.split(",")[0]


def measure(trunk, batch_size, num_tasks, rounds, clock):
    """Shortest time in seconds and temporary memory in bytes of each way."""
    problem = make_problem(trunk, batch_size, num_tasks)
    params, batch, trunk_fn, heads_fn = problem
    calls, memory = {}, {}
    steps = make_steps(num_tasks, trunk_fn, heads_fn, optax.adamw(1e-3))
    for name, (step, init) in steps.items():
        count = num_tasks * PER_TASK.get(group_of(name), 0) or 1
        inputs = jax.tree.map(lambda x, n=count: jnp.concatenate([x] * n), batch)
        args = (params, jax.jit(init)(params), *inputs)
        compiled = step.lower(*args).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        calls[name] = lambda compiled=compiled, args=args: compiled(*args)
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            times[name] = min(times[name], clock() - start)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    return times, memory, size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURE)
    args = parser.parse_args(argv)

    start = time.time()
    results = {}
    for model in args.models:
        for num_tasks in args.tasks:
            result = measure(*MODELS[model], num_tasks, args.rounds, CLOCKS[args.clock])
            results[model, num_tasks] = result
    print(as_markdown(results))
    device = jax.devices()[0].device_kind
    print(f"{args.clock} time on {device}; the run took {time.time() - start:.0f} s.")
    plot(results, args.figure)


def as_markdown(results) -> str:
    """One row for each model and way; time ratio and memory for each T."""
    tasks = sorted({num_tasks for _, num_tasks in results})
    head = ["model", "way", *(f"T={t}: time, MB" for t in tasks)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in dict.fromkeys(model for model, _ in results):
        times, _, size = results[model, tasks[0]]
        base = f"{model} ({size / 1e6:.1f} MB)"
        for way in times:
            row = [base, way]
            for t in tasks:
                times, memory, _ = results[model, t]
                if way not in times:
                    row.append("")
                    continue
                group = group_of(way)
                accumulates = group in PER_TASK
                yardstick = f"{group}, plain sum" if accumulates else "plain sum"
                ratio = times[way] / times[yardstick]
                row.append(f"{ratio:.2f}, {memory[way] / 1e6:.1f}")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def plot(results, path: pathlib.Path) -> None:
    """Time as a multiple of the plain sum's step, and memory, over T."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(model for model, _ in results))
    tasks = sorted({num_tasks for _, num_tasks in results})
    figure, axes = plt.subplots(
        2,
        len(models),
        figsize=(3.6 * len(models), 5.6),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column, model in zip(axes.T, models):
        times, memory = ({t: results[model, t][i] for t in tasks} for i in range(2))
        for way, style in DRAWN.items():
            ratios = [times[t][way] / times[t]["plain sum"] for t in tasks]
            column[0].loglog(tasks, ratios, marker=".", label=way, **style)
            megabytes = [memory[t][way] / 1e6 for t in tasks]
            column[1].loglog(tasks, megabytes, marker=".", label=way, **style)
        for axis in column:
            ticks = [tick for tick in TICKS if tick <= axis.get_ylim()[1]]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.grid(axis="y", lw=0.3)
        column[0].set_title(model)
        column[1].set_xlabel("tasks")
        column[1].set_xticks(tasks, [str(t) for t in tasks])
        column[1].minorticks_off()
    axes[0, 0].set_ylabel("time / plain sum's step")
    axes[1, 0].set_ylabel("temporary memory, MB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
