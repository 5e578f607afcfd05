"""What a race costs, against the same runs one after the other.

    python -m benchmarks.race               # some minutes

Six methods, four learning rates and three seeds on a small network with three tasks: by
``optax_mtl.compare`` with all runs of a method in one program, by the same with one run
at a time, and by a loop of jitted steps for each run, compiled once for each method.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def loops(num_steps, num_rates, once, num_seeds=3):
    """As ``race``, by training loops whose step is compiled once for each method.

    Not ``once``: for each run, as by a script that a sweep calls with its settings.
    """
    began, seconds = time.perf_counter(), 0.0
    for name in ("linear", *METHODS):
        step_of = functools.cache(stepper)
        for rate in np.geomspace(1e-3, 3e-2, num_rates):
            for seed in range(num_seeds):
                step, resolve = (step_of if once else stepper)(name)
                params, key = init_fn(jax.random.key(seed)), jax.random.key(seed)
                carry = params, resolve.init(params), optax.adam(rate).init(params)
                carry = step(*carry, rate, key, 0)  # Compiles.
                start = time.perf_counter()
                for number in range(1, num_steps):
                    carry = step(*carry, rate, key, number)
                jax.block_until_ready(carry)
                seconds += time.perf_counter() - start
    return time.perf_counter() - began, seconds


def stepper(name):
    """A jitted step of a method, and what gets its gradients."""
    method = optax_mtl.get(name, num_tasks=3)
    shared = lambda path: "heads" not in path
    resolve = optax_mtl.value_and_grad(losses_fn, method, shared=shared)

    @jax.jit
    def step(params, state, opt_state, rate, key, number):
        batch = batch_fn(key, number)
        _, grads, state = resolve(params, state, batch)
        updates, opt_state = optax.adam(rate).update(grads, opt_state)
        return optax.apply_updates(params, updates), state, opt_state

    return step, resolve


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--learning-rates", type=int, default=4)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    sweep, loop = (
        loops(args.num_steps, args.learning_rates, once) for once in (False, True)
    )
    *one, _ = race(args.num_steps, 1, args.learning_rates)
    *together, result = race(args.num_steps, None, args.learning_rates)
    print("| | with compiling, s | steps alone, s |")
    print("|---|---|---|")
    for title, row in {
        "one run after the other": sweep,
        "the same, each method compiled once": loop,
        "`compare`, one run at a time": one,
        "`compare`": together,
    }.items():
        print(f"| {title} | {row[0]:.1f} | {row[1]:.1f} |")
    for title, row in (("runs", sweep), ("runs compiled once", loop)):
        ratios = [x / y for x, y in zip(together, row)]
        print(f"| over {title} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    print(result)


if __name__ == "__main__":
    main()
