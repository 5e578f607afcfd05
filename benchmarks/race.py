"""What a race costs, against the same runs one after the other.

    python -m benchmarks.race               # some minutes

Six methods, four learning rates and three seeds on a small network with three tasks:
by ``optax_mtl.compare`` with all runs of a method in one program, and with one run at a
time in the same programs. Both with and without compilation.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import optax_mtl

METHODS = ("upgrad", "pcgrad", "cagrad", "nash_mtl", "imtl_l", "uncertainty_weighting")
W = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def init_fn(key):
    keys = jax.random.split(key, 3)
    shapes = {"first": (16, 64), "second": (64, 64), "heads": (64, 3)}
    make = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    return {name: make(*x) for name, x in zip(shapes, zip(keys, shapes.values()))}


def batch_fn(key, step):
    x = jax.random.normal(jax.random.fold_in(key, step), (64, 16))
    return x, jnp.tanh(x @ W) * jnp.array([1.0, 10.0, 0.1])


def losses_fn(params, batch):
    x, y = batch
    features = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
    errors = ((features @ params["heads"] - y) ** 2).mean(axis=0)
    return dict(zip(("one", "ten", "tenth"), errors))


def race(num_steps, chunk, num_rates):
    """Seconds in all, and seconds of the steps alone."""
    start = time.perf_counter()
    result = optax_mtl.compare(
        losses_fn,
        init_fn,
        batch_fn,
        METHODS,
        learning_rates=np.geomspace(1e-3, 3e-2, num_rates),
        num_steps=num_steps,
        weightings=0,
        shared=lambda path: "heads" not in path,
        chunk=chunk,
        progress=False,
    )
    runs = num_rates * result.values.shape[2]
    return time.perf_counter() - start, result.seconds.sum() * runs * num_steps, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--learning-rates", type=int, default=4)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    one, one_steps, _ = race(args.num_steps, 1, args.learning_rates)
    all_, all_steps, result = race(args.num_steps, None, args.learning_rates)
    print("| | all, s | steps alone, s |")
    print("|---|---|---|")
    print(f"| one after the other | {one:.1f} | {one_steps:.1f} |")
    print(f"| as one program a method | {all_:.1f} | {all_steps:.1f} |")
    print(f"| ratio | {all_ / one:.2f} | {all_steps / one_steps:.2f} |\n")
    print(result)


if __name__ == "__main__":
    main()
