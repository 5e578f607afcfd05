"""The two-task toy problem of the CAGrad and Nash-MTL papers: a figure of paths.

    python -m benchmarks.toy                # about two minutes; writes runs/toy.png
    python -m benchmarks.toy --methods linear pcgrad sam_gs --steps 5000

Seven starts, Adam with learning rate 1e-3 after each method. Counts the paths that end
on the Pareto front (the grey bar), and prints the sum of both losses at their ends; the
best possible is -30.18.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_mtl
from optax_mtl import plots

METHODS = "linear pcgrad cagrad mgda nash_mtl upgrad aligned_mtl sam_gs".split()
STARTS = [(-8, 5), (-3, 7.5), (0, 10), (3, 7.5), (8, 5), (-10, -3), (10, -3)]
FRONT = [(-7, -8.4), (7, -8.4)]  # About: between the minima of the two losses.
OPTIONS = {"sam_gs": {"scale_by_num_tasks": True}}


def toy_losses(x):
    """The problem with one optimum; the signs are those of the authors' code."""
    a, b = x
    f1 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-a - 7) - jnp.tanh(-b)), 5e-6)) + 6
    f2 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-a + 3) + jnp.tanh(-b) + 2), 5e-6)) + 6
    c1 = jnp.maximum(jnp.tanh(b / 2), 0)
    c2 = jnp.maximum(jnp.tanh(-b / 2), 0)
    q1 = ((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    q2 = ((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    return jnp.array([f1 * c1 + q1 * c2, f2 * c1 + q2 * c2])


def descend(method, steps):
    """The paths from all starts, shape (7, steps, 2), by one compiled scan."""
    tx = optax.chain(method, optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def step(carry, _):
        params, state = carry
        losses, updates = toy_losses(params), jax.jacrev(toy_losses)(params)
        updates, state = tx.update(updates, state, params, losses=losses)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = lambda start: jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]
    return jax.jit(jax.vmap(run))(jnp.array(STARTS, jnp.float32))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--steps", type=int, default=26_000)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path, default="runs/toy.png")
    args = parser.parse_args()

    columns = min(len(args.methods), args.columns)
    rows = -(-len(args.methods) // columns)
    size = 2.1 * columns, 2.3 * rows
    fig, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for name, ax in zip(args.methods, axes.flat):
        method = optax_mtl.get(name, 2, **OPTIONS.get(name, {}))
        paths = np.asarray(descend(method, args.steps))
        sums = np.asarray(jax.vmap(toy_losses)(paths[:, -1]).sum(axis=1))
        a, b = paths[:, -1].T
        reached = int(np.sum((np.abs(a) < 7) & (np.abs(b - FRONT[0][1]) < 0.1)))
        print(f"{name:16} {reached} of 7 reach the front; sums {np.round(sums, 2)}")
        paths = np.concatenate([np.array(STARTS)[:, None], paths], axis=1)
        ax.plot(*zip(*FRONT), color="0.75", linewidth=7, solid_capstyle="butt")
        plots.paths(toy_losses, paths, ax=ax)
        ax.set_title(f"{name}: {reached} of {len(STARTS)}", fontsize=11)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=110)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
