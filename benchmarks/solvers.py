"""Time of the weights of many tasks, from a ready Gram matrix.

    python -m benchmarks.solvers            # some minutes
    python -m benchmarks.solvers upgrad mgda --num-tasks 256 --kinds dependent

Every method that reads the Gram matrix alone, or the methods named, with random
gradients in 2 T dimensions, and dependent ones in T / 4, among which zero is a convex
combination: milliseconds of the shortest of some rounds.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import optax_mtl

DIMENSIONS = {"random": lambda T: 2 * T, "dependent": lambda T: T // 4}


def milliseconds(name, gram, rounds):
    """Of one resolution, without compiling."""
    num_tasks = len(gram)
    method = optax_mtl.get(name, num_tasks)
    losses = jnp.linspace(0.5, 2, num_tasks)

    @jax.jit
    def weigh(gram, state):
        view = optax_mtl.GramView(num_tasks, lambda: gram)
        return method.update(view, state, None, losses=losses)[0]

    state, times = method.init(None), []
    jax.block_until_ready(weigh(gram, state))
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(weigh(gram, state))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main():
    of_gram = [
        name
        for name, row in optax_mtl.METHODS.items()
        if "gram" in row.reads and "gradients" not in row.reads
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=of_gram)
    parser.add_argument("--num-tasks", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--kinds", nargs="+", default=list(DIMENSIONS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    columns = [(T, kind) for T in args.num_tasks for kind in args.kinds]
    print("| |", " | ".join(f"T = {T}, {kind}" for T, kind in columns), "|")
    print(f"|{'---|' * (len(columns) + 1)}")
    for name in args.methods:
        cells = []
        for T, kind in columns:
            shape = T, DIMENSIONS[kind](T)
            gradients = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            gram = jnp.asarray(gradients @ gradients.T)
            cells.append(f"{milliseconds(name, gram, args.rounds):.2f}")
        print(f"| `{name}` |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
