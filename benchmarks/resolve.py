"""Time of one resolution: ours, one copy of the gradients, and TorchJD.

    python -m benchmarks.resolve            # T = 4, 8 M parameters: about a minute
    python -m benchmarks.resolve --num-tasks 16 --size 2

Our methods receive a tree of about thirty leaves with a task axis and return a
tree; TorchJD (``pip install optax-mtl[bench]``) receives a ready-made flat matrix.
All alternate in one process, so that only the ratios of one run are compared.
"""

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import optax_mtl

NAMES = {
    "linear": "Sum",
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "upgrad": "UPGrad",
    "cagrad": "CAGrad",
    "aligned_mtl": "AlignedMTL",
    "imtl_g": "IMTLG",
    "config": "ConFIG",
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


def our_calls(updates, num_tasks):
    calls = {}
    for name in NAMES:
        method = optax_mtl.get(name, num_tasks)
        state = method.init([x[0] for x in updates])
        step = jax.jit(lambda u, s, method=method: method.update(u, s)[0])
        calls[name] = lambda step=step, state=state: jax.block_until_ready(
            step(updates, state)
        )
    return calls


def torchjd_calls(updates):
    import torch
    import torchjd.aggregation

    torch.set_num_threads(os.cpu_count() or 1)
    flat = [np.asarray(x).reshape(len(x), -1) for x in updates]
    matrix = torch.from_numpy(np.concatenate(flat, axis=1))
    calls = {}
    for name, peer in NAMES.items():
        arguments = {"CAGrad": {"c": 0.4}}.get(peer, {})
        aggregator = getattr(torchjd.aggregation, peer)(**arguments)
        calls[name] = lambda aggregator=aggregator: aggregator(matrix)
    return calls


def measure(calls, rounds):
    """Median seconds of each call; the calls alternate."""
    seconds = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tasks", type=int, default=4)
    parser.add_argument("--size", type=float, default=8.0, help="million parameters")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()

    updates = stacked_gradients(args.num_tasks, args.size)
    copy = jax.jit(lambda u: jax.tree.map(jnp.copy, u))
    calls = {("copy", ""): lambda: jax.block_until_ready(copy(updates))}
    ours = our_calls(updates, args.num_tasks)
    peers = torchjd_calls(updates)
    for name in NAMES:
        calls["ours", name] = ours[name]
        calls["TorchJD", name] = peers[name]
    seconds = measure(calls, args.rounds)

    parameters = sum(x[0].size for x in updates) / 1e6
    print(
        f"T = {args.num_tasks}, {parameters:.1f} M parameters in {len(updates)} leaves,"
        f" {jax.devices()[0].device_kind}, median of {args.rounds} alternating rounds\n"
    )
    one = seconds["copy", ""]
    print(f"one copy of the stacked gradients: {1e3 * one:.1f} ms\n")
    print("| method | ms | copies | TorchJD ms | ours / TorchJD |")
    print("|---|---|---|---|---|")
    for name in NAMES:
        mine, peer = seconds["ours", name], seconds["TorchJD", name]
        columns = [1e3 * mine, mine / one, 1e3 * peer, mine / peer]
        print(f"| `{name}` | " + " | ".join(f"{x:.2f}" for x in columns) + " |")


if __name__ == "__main__":
    main()
