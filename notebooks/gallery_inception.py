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
# # Heads on the way: does the early one oppose the last?
#
# GoogLeNet has classifiers half-way (Szegedy et al., *Going Deeper with Convolutions*,
# 2015), each with a loss of its own, so that gradients reach the early layers. The
# first modules then serve two ends: features that tell digits apart at once, and
# features for the modules above to work on. That early heads hurt the later ones is
# known from networks with early exits (Huang et al., *Multi-Scale Dense Networks*,
# 2018). Two minutes on a CPU.

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
import jax.flatten_util
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
STEPS = 500  # @param {type:"integer"}
SEEDS = 3  # @param {type:"integer"}
LEARNING_RATES = [5e-3, 2e-2]
METHODS = ["upgrad", "final first", "early by 0.3"]
WEIGHTINGS = 4  # @param {type:"integer"}
MODULES, WIDTH, BATCH, NOISE = 3, 4, 32, 0.3
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS, SEEDS, WEIGHTINGS, METHODS, MODULES = 10, 2, 1, METHODS[:1], 2

# %% [markdown]
# ## Data and network
#
# scikit-learn's digits, 8x8, with noise. A stem and three modules of four branches:
# 1x1, 3x3, 5x5 (as two of 3x3) and pooling, each of a few channels. One head after the
# first module, one after the last, both on channels averaged over the image. XLA runs
# small convolutions slowly on a CPU; here they are products of matrices.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images = jnp.asarray(images[order] / 16, jnp.float32)
labels = jnp.asarray(labels[order])
splits = {"train": (0, 1000), "select": (1000, 1400), "report": (1400, 1797)}


def draw(key, split, size):
    rows, noise = jax.random.split(key)
    rows = jax.random.randint(rows, (size,), *splits[split])
    x = images[rows]
    noise = NOISE * jax.random.normal(noise, x.shape)
    return (x + noise)[..., None], labels[rows]


modules = [f"module_{i}" for i in range(1, MODULES + 1)]
once, twice = (4 * WIDTH, WIDTH), (9 * WIDTH, WIDTH)
branches = {
    "1x1": {"1": once},
    "3x3": {"1": once, "2": twice},
    "5x5": {"1": once, "2": twice, "3": twice},
    "pool": {"1": once},
}
shapes = {"stem": (9, 4 * WIDTH)} | dict.fromkeys(modules, branches)
shapes["heads"] = {"early": (4 * WIDTH, 10), "final": (4 * WIDTH, 10)}
zeros = jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
flat, unravel = jax.flatten_util.ravel_pytree(zeros)


def init_fn(key):
    # All weights by one draw, which compiles faster than one for each.
    params = unravel(jax.random.normal(key, flat.shape))
    return jax.tree.map(lambda w: w * (2 / len(w)) ** 0.5, params)


def table_of_neighbours(size):
    """One where a pixel is the k-th neighbour of another: (pixels, 9, pixels)."""
    row, column = np.divmod(np.arange(size**2), size)
    table = np.zeros((size**2, 9, size**2), np.float32)
    for k in range(9):
        i, j = row + k // 3 - 1, column + k % 3 - 1
        inside = (0 <= i) & (i < size) & (0 <= j) & (j < size)
        table[inside, k, (i * size + j)[inside]] = 1
    return table


NEIGHBOURS = {size**2: table_of_neighbours(size) for size in (8, 4)}


def neighbours(x):
    """The 3x3 surroundings of each pixel, by a product: shape (batch, pixels, 9, C)."""
    return jnp.einsum("nkm,bmc->bnkc", NEIGHBOURS[x.shape[1]], x)


def convolve(x, w):
    if len(w) > x.shape[-1]:
        x = neighbours(x).reshape(*x.shape[:2], -1)
    return jax.nn.leaky_relu(x @ w, 0.1)


def normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=(1, 2), keepdims=True) + 1e-6)


def module(branches, x):
    out = []
    for name, weights in branches.items():
        y = neighbours(x).max(axis=-2) if name == "pool" else x
        for w in weights.values():
            y = convolve(y, w)
        out.append(y)
    return normalize(jnp.concatenate(out, axis=-1))


def logits_of(params, x):
    x = convolve(x, params["stem"])
    x = x.reshape(len(x), 4, 2, 4, 2, -1).max(axis=(2, 4)).reshape(len(x), 16, -1)
    x, logits = normalize(x), {}
    for name in modules:
        x = module(params[name], x)
        task = {modules[0]: "early", modules[-1]: "final"}.get(name)
        if task:
            logits[task] = x.mean(axis=1) @ params["heads"][task]
    return logits


def losses_fn(params, batch):
    x, y = batch
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return {task: entropy(z, y).mean() for task, z in logits_of(params, x).items()}


batch_fn = lambda key, step: draw(jax.random.fold_in(key, step), "train", BATCH)
shared = lambda path: path.startswith(("stem", "module_1"))  # Below both heads.

# %% [markdown]
# ## Do they oppose each other, and where?
#
# Training on the plain sum, with a recorder for all that is below both heads, and one
# for each part of it.

# %%
part = lambda path: path.rsplit("/", 1)[0]  # The stem, or a branch of the module.
recorder = optax_mtl.record_conflicts(2, decay=0.95)
method = optax.chain(recorder, optax_mtl.per_group(recorder, part), optax_mtl.linear())
resolve = optax_mtl.value_and_grad(
    losses_fn, method, shared=shared, mode="stacked", optimizer=optax.adam(1e-2)
)


@jax.jit
def train(key):
    def step(carry, number):
        params, state = carry
        losses, updates, state = resolve(params, state, batch_fn(key, number))
        params = optax_mtl.apply_updates(params, updates)
        return (params, state), (losses, optax_mtl.recorded(state))

    params = init_fn(key)
    return jax.lax.scan(step, (params, resolve.init(params)), jnp.arange(STEPS))


(params, _), (history, records) = train(jax.random.key(0))
names, of_all = list(history), records.pop("")
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
plots.losses(np.stack(list(history.values()), axis=1), names=names, ax=axes[0])
plots.conflict(of_all.mean.cosines, names=names, ax=axes[1])
over_time = np.stack([record.mean.cosines[:, 0, 1] for record in records.values()])
colours = {"cmap": plots.OPPOSED_TO_ALIGNED, "vmin": -1, "vmax": 1, "aspect": "auto"}
image = axes[2].imshow(over_time, **colours, interpolation="nearest")
axes[2].set_yticks(range(len(records)), records)
axes[2].set_xlabel("step")
fig.colorbar(image, ax=axes[2], label="cosine", ticks=[-1, 0, 1])
plt.show()

# %% [markdown]
# A batch of 32 is noisy. Once more without the noise, by `conflicts_by_group`: a
# thousand digits at once, at the first parameters and at the last.

# %%
grads_fn = jax.jit(optax_mtl.value_and_task_grads(losses_fn, shared=shared))
batch = draw(jax.random.key(2), "train", 1000)
print("part           in conflict   cosine at the start   at the end")
reports = []
for p in (init_fn(jax.random.key(0)), params):
    grads = {k: g for k, g in grads_fn(p, batch)[1].items() if shared(k)}
    reports.append(optax_mtl.conflicts_by_group(grads, part, names))
for name, record in records.items():
    share = record.conflicting[-1, 0, 1]
    start, end = (float(report[name].cosines[0, 1]) for report in reports)
    print(f"{name:14} {share:8.0%} {start:+17.2f} {end:+17.2f}")

# %% [markdown]
# ## A race
#
# By the error of both heads, on other digits. Beside the methods there are GoogLeNet's
# weight of early heads, 0.3, static weightings, and each loss alone: does the last head
# gain anything by the early one?


# %%
def evaluate_on(split):
    x, y = draw(jax.random.key(1), split, 1000)

    def evaluate(params):
        logits = logits_of(params, x)
        return {task: (z.argmax(axis=1) != y).mean() for task, z in logits.items()}

    return evaluate


makers = {
    "upgrad": lambda num_tasks: optax_mtl.upgrad(),
    "final first": lambda num_tasks: optax_mtl.priority_projection([1, 0]),
    "early by 0.3": lambda num_tasks: optax_mtl.linear([0.3, 1]),
}
result = optax_mtl.compare(
    losses_fn,
    init_fn,
    batch_fn,
    {name: makers[name] for name in METHODS},
    optimizer=lambda rate: optax.adam(optax.linear_schedule(rate, 0, STEPS)),
    learning_rates=LEARNING_RATES,
    seeds=SEEDS,
    num_steps=STEPS,
    weightings=WEIGHTINGS,
    evaluate=evaluate_on("report"),
    select=evaluate_on("select"),
    shared=shared,
    single_task=True,
    conflicts=False,
)
print(result.table())
print()
print(result.verdict())

# %%
fig, ax = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
rows = [0, *result.racers()]
plots.trade_off(
    result.at_best()[rows],
    [result.methods[i] for i in rows],
    [f"error of the {metric} head" for metric in result.metrics],
    result.frontier(),
    ax=ax,
)
plt.show()
alone = result.at_best()[result.methods.index("only final"), :, 1]
print(f"the last head alone: error {alone.mean():.3f} ± {alone.std(ddof=1):.3f}")

# %% [markdown]
# What we saw: no conflict. Gradients of single batches oppose each other now and then,
# in some branches in every third, but that is the noise of 32 digits: on a thousand
# they point the same way in every part, and more so at the end. A share of steps in
# conflict says little until one knows what noise makes of it.
#
# So there is nothing to repair, and no method is ahead of the sum beyond the spread.
# Nor is there the gain that early heads were made for: alone, the last head is as good.
# Gradients pass three modules without help. The early head pays a little for company
# (the table has each loss alone), and more with a weight of 0.3, by which the last
# head gains nothing.
