"""Compile time over the number of leaves, against an optimizer on the same leaves.

    python -m benchmarks.compile                  # 300 leaves: some minutes
    python -m benchmarks.compile --leaves 1000 m_config adatask

Every row of the catalog, or the methods named, with T tasks and leaves of shape
(16, 8), lowered and compiled, in multiples of ``optax.apply_if_finite(optax.adam)``.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

import optax_mtl


def seconds(tx, leaves, *lead):
    """Processor seconds to lower and compile an update; ``lead``: the task axis."""
    params = [jax.ShapeDtypeStruct((16, 8), jnp.float32)] * leaves
    updates = [jax.ShapeDtypeStruct((*lead, 16, 8), jnp.float32)] * leaves
    state = jax.eval_shape(tx.init, params)
    losses = {"losses": jnp.linspace(0.5, 2, *lead)} if lead else {}
    start = time.process_time()
    step = lambda updates, state, params: tx.update(updates, state, params, **losses)
    jax.jit(step).lower(updates, state, params).compile()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(optax_mtl.METHODS))
    parser.add_argument("--num-tasks", type=int, default=4)
    parser.add_argument("--leaves", type=int, default=300)
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    seconds(optax.adam(1e-3), 1)  # Whatever JAX does once.
    adam = seconds(optax.apply_if_finite(optax.adam(1e-3), 3), args.leaves)
    noise = seconds(optax.add_noise(0.1, 0.5, key=0), args.leaves)
    print(f"T = {args.num_tasks}, {args.leaves} leaves, processor time\n")
    print("| | s | over `apply_if_finite(adam)` |")
    print("|---|---|---|")
    print(f"| `optax.apply_if_finite(optax.adam)` | {adam:.1f} | 1.0 |")
    print(f"| `optax.add_noise` | {noise:.1f} | {noise / adam:.1f} |")
    for name in args.methods:
        method = optax_mtl.get(name, args.num_tasks)
        found = seconds(method, args.leaves, args.num_tasks)
        print(f"| `{name}` | {found:.1f} | {found / adam:.1f} |", flush=True)


if __name__ == "__main__":
    main()
