# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,kernelspec,jupytext,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # An image-to-image generator with an adversarial loss
#
# A generator doubles the resolution of patches of photos. Its reconstruction loss likes
# blurred images, since the mean of all that could be there has the least error; the
# adversarial loss likes sharp ones (Isola et al., *Image-to-Image Translation with
# Conditional Adversarial Networks*, 2017). How much of the second? VQGAN answers by the
# norms of both gradients at the last layer (`adaptive_weight`); one may also let the
# adversarial loss do what it likes as long as it does not harm the reconstruction
# (`priority_projection`). Two optimizers, as in every GAN. A minute or two on a CPU.

# %%
# Installs the library on Colab, and nothing that could replace Colab's own JAX.
import pathlib
import subprocess
import sys

if "google.colab" in sys.modules:
    in_checkout = pathlib.Path("../pyproject.toml").exists()
    source = ".." if in_checkout else "optax-mtl"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "optax>=0.2.8", source], check=True)

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_sample_images

import optax_mtl
from optax_mtl import plots

print("JAX running on", jax.devices()[0].platform.upper())

# %%
# @title Settings
STEPS = 1200  # @param {type:"integer"}
SEEDS = 2  # @param {type:"integer"}
WEIGHTS = [0.0, 0.03, 0.3, 1.0]  # Of the adversarial loss, in the plain sum.
RATES = [1e-3, 3e-3]
BATCH, WIDTH = 64, 128
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS, SEEDS, WEIGHTS, RATES = 20, 2, WEIGHTS[1:2], RATES[:1]

# %% [markdown]
# ## Data and networks
#
# Grey patches of 16 x 16 pixels from scikit-learn's two photos; the generator sees the
# averages of 2 x 2 pixels. The left three fifths of the photos are for training, a
# fifth for the choice of rates, a fifth for the figures reported. Both networks are
# dense.

# %%
photos = np.stack(load_sample_images().images).mean(axis=-1).astype(np.float32) / 255
patches = photos[:, :416, :640].reshape(2, 26, 16, 40, 16).transpose(0, 3, 1, 2, 4)
columns = {"train": slice(0, 24), "select": slice(24, 32), "report": slice(32, 40)}
data = {k: jnp.asarray(patches[:, c].reshape(-1, 16, 16)) for k, c in columns.items()}


def draw(key, split):
    """Sharp patches and the same at half the resolution, mirrored at random."""
    pick, mirror = jax.random.split(key)
    sharp = data[split][jax.random.randint(pick, (BATCH,), 0, len(data[split]))]
    flip = jax.random.bernoulli(mirror, 0.5, (BATCH, 1, 1))
    sharp = jnp.where(flip, sharp[:, :, ::-1], sharp)
    return sharp, reduce(sharp)


def reduce(sharp):
    return sharp.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))


def dense(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:])
    scaled = lambda k, m, n: jax.random.normal(k, (m, n)) * (2 / m) ** 0.5
    return {f"layer_{i}": scaled(*pair) for i, pair in enumerate(pairs)}


def apply(params, x):
    *hidden, last = params.values()
    for w in hidden:
        x = jax.nn.leaky_relu(x @ w, 0.1)
    return x @ last


def generate(params, small):
    coarse = jnp.repeat(jnp.repeat(small, 2, axis=1), 2, axis=2)
    details = apply(params, small.reshape(len(small), -1) - 0.5)
    return coarse + 0.1 * details.reshape(-1, 16, 16)


def judge(params, image, small):
    coarse = jnp.repeat(jnp.repeat(small, 2, axis=1), 2, axis=2)
    flat = lambda x: x.reshape(len(x), -1)
    details = 10 * flat(image - coarse)
    return apply(params, jnp.concatenate([details, flat(small) - 0.5], axis=1))[:, 0]


def generator_losses(params, judge_params, sharp, small):
    fake = generate(params, small)
    return {
        "adversarial": -judge(judge_params, fake, small).mean(),
        "reconstruction": jnp.abs(fake - sharp).mean() * 10,
    }


def judge_loss(judge_params, params, sharp, small):
    fake = judge(judge_params, generate(params, small), small)
    true = judge(judge_params, sharp, small)
    return (jax.nn.relu(1 + fake) + jax.nn.relu(1 - true)).mean()


# %% [markdown]
# ## One training for all
#
# The generator's two losses go through a method; the judge has an optimizer of its own.
# What the figures are measured by: the error of the image, and how sharp it is, as the
# size of its differences between neighbours over that of the true image (1 is right).


# %%
def sharpness(images):
    across, down = jnp.diff(images, axis=2), jnp.diff(images, axis=1)
    return jnp.abs(across).mean() + jnp.abs(down).mean()


def evaluate(params, split):
    sharp = data[split]
    fake = generate(params, reduce(sharp))
    return jnp.stack([jnp.abs(fake - sharp).mean(), sharpness(fake) / sharpness(sharp)])


@functools.partial(jax.jit, static_argnums=(0, 3))
def train(method_of, rates, seeds, recording=False):
    """Metrics of both splits, for each rate and seed, and what was recorded."""

    def run(rate, seed):
        first, second, batches = jax.random.split(jax.random.key(seed), 3)
        params = dense(first, 64, WIDTH, WIDTH, 256)
        judge_params = dense(second, 256 + 64, WIDTH, 1)
        resolve = optax_mtl.value_and_grad(
            generator_losses,
            method_of(),
            measure=lambda path: path == "layer_2",
            optimizer=optax.adam(rate, b1=0.5),
        )
        judge_tx = optax.adam(rate, b1=0.5)

        def step(carry, key):
            params, judge_params, state, judge_state = carry
            batch = draw(key, "train")
            _, updates, state = resolve(params, state, judge_params, *batch)
            params = optax_mtl.apply_updates(params, updates)
            grads = jax.grad(judge_loss)(judge_params, params, *batch)
            updates, judge_state = judge_tx.update(grads, judge_state)
            judge_params = optax.apply_updates(judge_params, updates)
            record = optax_mtl.recorded(state).mean if recording else ()
            return (params, judge_params, state, judge_state), record

        carry = params, judge_params, resolve.init(params), judge_tx.init(judge_params)
        carry, records = jax.lax.scan(step, carry, jax.random.split(batches, STEPS))
        return [evaluate(carry[0], split) for split in ("select", "report")], records

    over_seeds = jax.vmap(run, (None, 0))
    return jax.vmap(over_seeds, (0, None))(rates, seeds)


# %% [markdown]
# ## Do they conflict?
#
# In the plain sum, at the last layer, by a recorder in front of it.

# %%
recorder = lambda: optax.chain(
    optax_mtl.record_conflicts(2, decay=0.95), optax_mtl.linear()
)
_, records = train(recorder, jnp.array(RATES[:1]), jnp.arange(1), recording=True)
records = jax.tree.map(lambda x: np.asarray(x)[0, 0], records)
tasks = ["adversarial", "reconstruction"]
fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
plots.conflict(records.cosines, names=tasks, ax=axes[0])
plots.weights(records.norms, names=tasks, ax=axes[1]).set_ylabel("norm at last layer")
plt.show()
print(f"mean cosine {records.cosines[:, 0, 1].mean():+.2f}")

# %% [markdown]
# ## Sums, and three methods

# %%
summed = lambda weight: (
    lambda: optax_mtl.linear({"adversarial": weight, "reconstruction": 1.0})
)
methods = {f"sum, {weight}": summed(weight) for weight in WEIGHTS}
methods |= {
    "adaptive_weight": lambda: optax_mtl.adaptive_weight(0.8, primary="reconstruction"),
    "priority_projection": lambda: optax_mtl.priority_projection(
        order=["reconstruction", "adversarial"]
    ),
    "upgrad": lambda: optax_mtl.upgrad(),
}
found = {
    name: train(method, jnp.array(RATES), jnp.arange(SEEDS))[0]
    for name, method in methods.items()
}

# %% [markdown]
# ## What comes out
#
# The rate of each row is the one with the least error on the patches of the choice.


# %%
def at_best_rate(found):
    select, report = np.asarray(found)  # Each of (rates, seeds, metrics).
    return report[select[..., 0].mean(axis=1).argmin()]


points = {name: at_best_rate(x) for name, x in found.items()}
print("| | error of a pixel | sharpness |\n|---|---|---|")
for name, values in points.items():
    (error, sharp), (error_std, sharp_std) = values.mean(axis=0), values.std(axis=0)
    print(f"| {name} | {error:.4f} ± {error_std:.4f} | {sharp:.2f} ± {sharp_std:.2f} |")
rivals = [name for name in points if not name.startswith("sum")]
ax = plots.trade_off(
    [points[name] for name in rivals],
    rivals,
    ["error of a pixel", "sharpness, 1 is right"],
    static=[x.mean(axis=0) for name, x in points.items() if name.startswith("sum")],
    signs=(1, -1),
)
plt.show()

# %% [markdown]
# What we saw: the two gradients are orthogonal rather than opposed, and one is thirty
# times the other. All rows lie on one curve, from exact and blurred to sharp and less
# exact, and no method leaves it: what a method decides is *where* on the curve it ends.
# `adaptive_weight` makes the gradients equally long and ends near the sum with a weight
# of 0.03, without a trial. `priority_projection` and `upgrad` only take away what
# conflicts, which is next to nothing; so they keep the large adversarial gradient and
# end where the sum does that leaves it at its weight. If you know how sharp an image is
# to be, one number does it; if you do not, VQGAN's norms are a good first guess.
