"""Time of one resolution over that of the memory it must move, and TorchJD's.

    python -m benchmarks.resolve            # T = 4, 8 M parameters: some minutes
    python -m benchmarks.resolve --num-tasks 16 --size 2
    python -m benchmarks.resolve --clock cpu graddrop mgda

Every row of the catalog, or the methods named, receives a tree of about thirty leaves
with a task axis and returns a tree. What cannot be avoided is to read the stacked
gradients twice (measure, combine), to write the update, and to read and write the
state, at the speed of the fastest copy of the gradients in the run. TorchJD
(``pip install optax-mtl[bench]``), if installed, receives a ready-made flat matrix.
"""

import argparse
import importlib.util
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import optax_mtl

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PEERS = {
    "linear": "Sum",
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "upgrad": "UPGrad",
    "cagrad": "CAGrad",
    "aligned_mtl": "AlignedMTL",
    "imtl_g": "IMTLG",
    "config": "ConFIG",
    "graddrop": "GradDrop",
    "trimmed_mean": "TrimmedMean",
}


def transformer_shapes(size):
    """Shapes of a small transformer with ``size`` million parameters, 33 leaves."""
    width = round((size * 1e6 / 48) ** 0.5)
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return 4 * (block + [(width,)] * 4) + [(width,)]


def stacked_gradients(num_tasks, size):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(num_tasks, 2))  # A common part makes some tasks conflict.

    def leaf(shape):
        common = np.tensordot(mix, rng.normal(size=(2, *shape)), axes=1)
        return jnp.asarray(common + rng.normal(size=(num_tasks, *shape)), jnp.float32)

    return [leaf(shape) for shape in transformer_shapes(size)]


def our_call(name, updates):
    """The compiled step with its state, and the share of a copy that is unavoidable."""
    num_tasks = len(updates[0])
    method = optax_mtl.get(name, num_tasks)
    params = [jnp.zeros(x.shape[1:]) for x in updates]
    losses = jnp.linspace(0.5, 2, num_tasks)
    step = jax.jit(
        lambda updates, state: method.update(updates, state, params, losses=losses),
        donate_argnums=1,
    )
    states = [jax.jit(method.init)(params)]
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    moved = 2 * size(updates) + size(params) + 2 * size(states)

    def call():
        update, states[0] = step(updates, states[0])
        jax.block_until_ready((update, states))

    return call, moved / (2 * size(updates))


def torchjd_call(name, updates):
    import torch
    import torchjd.aggregation

    torch.set_num_threads(os.cpu_count() or 1)
    flat = [np.asarray(x).reshape(len(x), -1) for x in updates]
    matrix = torch.from_numpy(np.concatenate(flat, axis=1))
    arguments = {"CAGrad": {"c": 0.4}, "TrimmedMean": {"trim_number": 1}}
    peer = PEERS[name]
    aggregator = getattr(torchjd.aggregation, peer)(**arguments.get(peer, {}))
    return lambda: aggregator(matrix)


def measure(calls, rounds, clock):
    """Median seconds of each call; the calls alternate."""
    seconds = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            start = clock()
            call()
            seconds[key].append(clock() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(optax_mtl.METHODS))
    parser.add_argument("--num-tasks", type=int, default=4)
    parser.add_argument("--size", type=float, default=8.0, help="million parameters")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    args = parser.parse_args()

    updates = stacked_gradients(args.num_tasks, args.size)
    copy = jax.jit(lambda u: jax.tree.map(jnp.copy, u))
    has_peers = importlib.util.find_spec("torchjd") is not None
    parameters = sum(x[0].size for x in updates) / 1e6
    print(
        f"T = {args.num_tasks}, {parameters:.1f} M parameters in {len(updates)} leaves,"
        f" {jax.devices()[0].device_kind}, {args.clock} time, median of {args.rounds}"
        " alternating rounds\n"
    )
    rows = {}
    for name in args.methods:
        call, unavoidable = our_call(name, updates)
        calls = {"copy": lambda: jax.block_until_ready(copy(updates)), "ours": call}
        if has_peers and name in PEERS:
            calls["TorchJD"] = torchjd_call(name, updates)
        rows[name] = measure(calls, args.rounds, CLOCKS[args.clock]), unavoidable

    one = min(seconds["copy"] for seconds, _ in rows.values())
    print(f"one copy of the stacked gradients: {1e3 * one:.1f} ms\n")
    print("| method | ms | over unavoidable | TorchJD, ms | over TorchJD |")
    print("|---|---|---|---|---|")
    for name, (seconds, unavoidable) in rows.items():
        ours, peer = seconds["ours"], seconds.get("TorchJD")
        columns = [1e3 * ours, ours / (unavoidable * one)]
        columns += [1e3 * peer, ours / peer] if peer else []
        cells = [f"{x:.2f}" for x in columns] + [""] * (4 - len(columns))
        print(f"| `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
