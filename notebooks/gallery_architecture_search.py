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
# # Searching a network: accuracy against cost
#
# How wide is each layer to be? Differentiable search learns it by gradients: a softmax
# over widths in each layer, trained on the accuracy of the mixture and on what it is
# expected to cost (Wu et al., *FBNet*, 2019; widths as masks of one layer as in Wan et
# al., *FBNetV2*, 2020). One wants the layers wide, the other narrow, and the answer is
# not one network but a trade-off. Two minutes on a CPU.

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
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_mtl
from optax_mtl import plots

print("JAX running on", jax.devices()[0].platform.upper())

# %%
# @title Settings
STEPS = 1200  # @param {type:"integer"}
SEEDS = 3  # @param {type:"integer"}
RATES = [0.01, 0.03]  # Of the architecture.
METHODS = ["sum", "upgrad", "mgda", "pbi", "stch"]
PRICES = 10 ** np.linspace(-1.5, 1, 6)
RATIOS = 10 ** np.linspace(-1.7, 0.3, 6)
WIDTHS = [0, 1, 2, 4, 8, 16, 32]
BLOCKS, WIDTH, FIELD, BATCH = 3, 32, 11, 32
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS, SEEDS, METHODS = 10, 1, ["sum", "pbi"]

# %% [markdown]
# ## Data and network
#
# scikit-learn's digits, 8x8, each at a random place of a field of 11x11: a linear
# model does not get far. One linear layer, three residual blocks with up to 32 hidden
# units each, and a linear head. A block of width r costs 128 r floating-point
# operations; nothing else is for the search to decide.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images = jnp.asarray(images[order].reshape(-1, 8, 8) / 16, jnp.float32)
labels = jnp.asarray(labels[order])
splits = {"train": (0, 1200), "weights": (0, 600), "architecture": (600, 1200)}
splits |= {"select": (1200, 1500), "report": (1500, 1797)}


def draw(key, split, size):
    rows, places = jax.random.split(key)
    rows = jax.random.randint(rows, (size,), *splits[split])
    places = jax.random.randint(places, (size, 2), 0, FIELD - 8 + 1)
    place = lambda x, at: jax.lax.dynamic_update_slice(jnp.zeros((FIELD, FIELD)), x, at)
    return jax.vmap(place)(images[rows], places).reshape(size, -1), labels[rows]


MASKS = jnp.arange(WIDTH) < jnp.array(WIDTHS)[:, None]  # The first r units of a block.
COSTS = 2 * 2 * WIDTH * jnp.array(WIDTHS)
MOST = BLOCKS * COSTS[-1]
blocks = [f"block_{i}" for i in range(1, BLOCKS + 1)]


def init_fn(key):
    keys = iter(jax.random.split(key, 2 + 2 * BLOCKS))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[0] ** 0.5
    weights = {"first": normal(FIELD**2, WIDTH), "head": normal(WIDTH, 10)}
    weights |= {name: (normal(WIDTH, WIDTH), normal(WIDTH, WIDTH)) for name in blocks}
    return {
        "architecture": {name: jnp.zeros(len(WIDTHS)) for name in blocks},
        "weights": weights,
    }


def classify(weights, mixture, x):
    """Logits; a mixture has, for each block, a share of each width."""
    x = x @ weights["first"]
    for name in blocks:
        into, out = weights[name]
        x = x + (jax.nn.relu(x @ into) * (mixture[name] @ MASKS)) @ out
    return x @ weights["head"]


def cost(mixture):
    return sum(mixture[name] @ COSTS for name in blocks)


def entropy_of(weights, mixture, batch):
    logits = classify(weights, mixture, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# %% [markdown]
# The architecture is trained on other digits than the weights, as is custom since DARTS
# (Liu et al., 2019), and with noise that draws a width in each step (Gumbel softmax).
# Only the architecture has two tasks: it is what the method resolves. The weights'
# own loss joins as a term that is zero, but for its gradient.

# %%
stop = jax.lax.stop_gradient


def losses_fn(params, batch):
    architecture = params["architecture"]
    draws = {
        name: jax.nn.softmax((architecture[name] + batch["noise"][i]) / batch["heat"])
        for i, name in enumerate(blocks)
    }
    own = entropy_of(params["weights"], stop(draws), batch["weights"])
    of_draws = entropy_of(stop(params["weights"]), draws, batch["architecture"])
    expected = cost(jax.tree.map(jax.nn.softmax, architecture)) / MOST
    return {"cost": expected, "error": of_draws + own - stop(own)}


def batch_fn(key, step):
    keys = jax.random.split(jax.random.fold_in(key, step), 3)
    return {
        "weights": draw(keys[0], "weights", BATCH),
        "architecture": draw(keys[1], "architecture", BATCH),
        "noise": jax.random.gumbel(keys[2], (BLOCKS, len(WIDTHS))),
        "heat": 2 * 0.1 ** (step / STEPS),  # From 2 to 0.2.
    }


def optimizer(rate):
    return optax.partition(
        {"architecture": optax.adam(rate, b1=0.5), "weights": optax.adam(3e-3)},
        lambda params: {name: name for name in params},
    )


shared = lambda path: path.startswith("architecture")


def search(method, key, rate, watch=lambda state: None):
    """The architecture, its losses over time, and what is to be seen of the state."""
    resolve = optax_mtl.value_and_grad(
        losses_fn, method, shared=shared, mode="stacked", optimizer=optimizer(rate)
    )

    def step(carry, number):
        params, state = carry
        losses, updates, state = resolve(params, state, batch_fn(key, number))
        params = optax_mtl.apply_updates(params, updates)
        return (params, state), (losses, watch(state))

    params = init_fn(key)
    carry = params, resolve.init(params)
    (params, _), (losses, seen) = jax.lax.scan(step, carry, jnp.arange(STEPS))
    return params["architecture"], losses, seen


# %% [markdown]
# ## Do they conflict?
#
# The plain sum, with a recorder for each block.

# %%
recorder = optax_mtl.record_conflicts(2, decay=0.98)
part = lambda path: path.rsplit("/", 1)[-1]
method = optax.chain(optax_mtl.per_group(recorder, part), optax_mtl.linear())
watched = jax.jit(lambda key: search(method, key, RATES[0], optax_mtl.recorded))
architecture, history, records = watched(jax.random.key(0))
names = list(history)
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
plots.losses(np.stack(list(history.values()), axis=1), names=names, ax=axes[0])
for (name, record), colour in zip(records.items(), plots.COLOURS):
    cosine = record.mean.cosines[:, 0, 1]
    axes[1].plot(cosine, color=colour, label=name)
    share = record.conflicting[-1, 0, 1]
    print(f"{name}: in conflict in {share:.0%}, mean cosine {cosine.mean():+.2f}")
axes[1].axhline(0, color="0.7", linewidth=0.8)
axes[1].set(ylim=(-1.05, 1.05), xlabel="step", ylabel="cosine of cost and error")
axes[1].legend(fontsize="x-small")
shares = np.stack([jax.nn.softmax(architecture[name]) for name in blocks])
image = axes[2].imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
axes[2].set_xticks(range(len(WIDTHS)), WIDTHS)
axes[2].set_yticks(range(BLOCKS), blocks)
axes[2].set_xlabel("width")
fig.colorbar(image, ax=axes[2], label="share", ticks=[0, 1])
plt.show()

# %% [markdown]
# ## Found networks, trained anew
#
# Each block takes its likeliest width, and a network of these widths is trained from
# the start, on all 1,200 digits: what counts is its error, not that of the mixture.


# %%
def found(architecture):
    pick = lambda x: jax.nn.one_hot(x.argmax(), len(WIDTHS))
    return jax.tree.map(pick, architecture)


def retrain(network, key):
    """Error on the two splits, and the cost."""
    tx = optax.adam(optax.linear_schedule(5e-3, 0, STEPS))

    def step(carry, number):
        weights, state = carry
        batch = draw(jax.random.fold_in(key, number), "train", BATCH)
        grads = jax.grad(entropy_of)(weights, network, batch)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(weights, updates), state), None

    weights = init_fn(key)["weights"]
    weights = jax.lax.scan(step, (weights, tx.init(weights)), jnp.arange(STEPS))[0][0]
    errors = []
    for split in ("select", "report"):
        x, y = draw(jax.random.key(1), split, 1000)
        errors.append((classify(weights, network, x).argmax(axis=1) != y).mean())
    return jnp.stack([cost(network) / MOST, *errors])


# %% [markdown]
# ## Trade-off curves
#
# Each method goes through six preferences. For the sum, and for `mgda` and `upgrad`
# behind `reweigh`, that is the price of cost. For `pbi` and `stch` it is the ratio that
# the two losses are to have, wherever the front lies.

# %%
makers = {
    "sum": lambda price: optax_mtl.linear([price, 1]),
    "upgrad": lambda price: optax.chain(
        optax_mtl.reweigh(optax_mtl.linear([price, 1])), optax_mtl.upgrad()
    ),
    "mgda": lambda price: optax.chain(
        optax_mtl.reweigh(optax_mtl.linear([price, 1])), optax_mtl.mgda()
    ),
    "pbi": lambda ratio: optax_mtl.pbi(preference=[ratio, 1]),
    "stch": lambda ratio: optax_mtl.stch(
        2, mu=0.1, objective="linear", preference=[1 / ratio, 1]
    ),
}


def run(make, preference, seed, rate):
    """Cost and errors of the network found, and the ratio of the last losses."""
    key, other = jax.random.split(jax.random.key(seed))
    architecture, losses, _ = search(make(preference), key, rate)
    last = {name: loss[-100:].mean() for name, loss in losses.items()}
    return retrain(found(architecture), other), last["cost"] / last["error"]


def best_rate(table):
    """Results, shape (preferences, seeds, 3), at the rate that select puts first."""
    score = lambda x: np.mean([volume(x[:, i, :2]) for i in range(SEEDS)])
    return max(range(len(RATES)), key=lambda rate: score(table[:, :, rate]))


volume = lambda points: optax_mtl.hypervolume(points, reference=[1, 1])
curves = {}
print("          volume          highest cost")
for name in METHODS:
    preferences = RATIOS if name in ("pbi", "stch") else PRICES
    grid = np.meshgrid(preferences, np.arange(SEEDS), RATES, indexing="ij")
    runs = jax.jit(jax.vmap(lambda *x, make=makers[name]: run(make, *x)))
    flat = [jnp.asarray(x.reshape(-1), dtype) for x, dtype in zip(grid, "fif")]
    table, ratios = (np.asarray(x).reshape(*grid[0].shape, -1) for x in runs(*flat))
    rate = best_rate(table)
    curves[name] = table[:, :, rate][:, :, [0, 2]]
    volumes = [volume(curves[name][:, i]) for i in range(SEEDS)]
    highest = curves[name][..., 0].max()
    print(f"{name:8} {np.mean(volumes):.3f} ± {np.std(volumes):.3f} {highest:12.2f}")
    if name in ("pbi", "stch"):
        attained = np.array2string(ratios[:, :, rate].mean(axis=(1, 2)), precision=2)
        print(f"    ratio asked for {np.array2string(RATIOS, precision=2)}")
        print(f"    ratio attained  {attained}")

# %% [markdown]
# What does searching gain at all? The rival is to make all blocks equally wide.

# %%
uniform = [dict.fromkeys(blocks, row) for row in jnp.eye(len(WIDTHS))]
keys = jnp.stack([jax.random.split(jax.random.key(i))[1] for i in range(SEEDS)])
plain = jax.jit(jax.vmap(retrain, (None, 0)))
table = np.stack([plain(network, keys) for network in uniform])
curves["uniform widths"] = table[..., [0, 2]]
volumes = [volume(table[:, i, [0, 2]]) for i in range(SEEDS)]
print(f"uniform widths {np.mean(volumes):.3f} ± {np.std(volumes):.3f}")

fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
for (name, points), colour, marker in zip(
    curves.items(), ("0.35", *plots.COLOURS[:4], "0.7"), plots.MARKERS
):
    ax.plot(*points.reshape(-1, 2).T, marker, color=colour, markersize=3, alpha=0.6)
    ax.plot(*points.mean(axis=1).T, marker + "-", color=colour, label=name)
ax.set_xscale("symlog", linthresh=0.02)
ax.set(xlabel="cost, share of the widest", ylabel="error of the network found")
ax.legend(fontsize="x-small")
plt.show()

# %% [markdown]
# What we saw: the conflict is there by construction, and it shows, in three of four
# steps, once the cost has fallen from where it starts.
#
# A sum with six prices, `pbi` and `stch` with six ratios come to much the same curve.
# What `pbi` adds is the place on it: the losses end near the ratio asked for, where one
# does not know beforehand what a price leads to.
#
# `upgrad` and `mgda` are not for this, whatever the price. No step of theirs may raise
# a loss, to first order. The gradient of the cost has no noise, so that the cost can
# fall and never rises; the error is another one in each batch. They end far below the
# cost that the search starts from (the highest costs are in the table).
#
# And equal widths, without any search, lie on the same curve. Three blocks that are
# alike leave little to find.
