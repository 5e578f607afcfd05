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
# # From a plain Optax loop to a resolved one
#
# One network learns three tasks at once. We train it on the sum of the losses, look
# whether the gradients of the tasks conflict, and only then change two lines, so that
# a published method resolves the conflict inside the Optax chain. Runs on CPU, GPU or
# TPU in under two minutes.

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
import itertools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_mtl

print("JAX running on", jax.devices()[0].platform.upper())

# %%
# @title Settings
STEPS = 1500  # @param {type:"integer"}
BATCH_SIZE = 64  # @param {type:"integer"}
FEATURES = 12  # @param {type:"integer"}
LEARNING_RATE = 2e-3  # @param {type:"number"}
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS = 30

# %% [markdown]
# ## Two digits on one canvas
#
# Two of scikit-learn's real handwritten digits are overlaid. The tasks: read the left
# digit, read the right digit, and draw the canvas again from a few features. The
# features cannot hold both *what* the digits are and *what they look like*, so there
# is something to quarrel about.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.images[order] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order])
train = images[:1297], labels[:1297]
test = images[1297:], labels[1297:]


def sample(key, split, size):
    images, labels = split
    i, j = jax.random.randint(key, (2, size), 0, len(labels))
    left = jnp.pad(images[i], ((0, 0), (0, 4), (0, 4)))
    right = jnp.pad(images[j], ((0, 0), (4, 0), (4, 0)))
    return jnp.maximum(left, right).reshape(size, -1), labels[i], labels[j]


test_batch = sample(jax.random.key(1), test, 500)
figure, panels = plt.subplots(1, 6, figsize=(9, 1.8))
for axes, canvas, left, right in zip(panels, *test_batch):
    axes.imshow(canvas.reshape(12, 12), cmap="gray_r")
    axes.set(title=f"{left}, {right}", xticks=[], yticks=[])

# %% [markdown]
# ## A plain training loop
#
# A trunk that all tasks share and a linear head for each, in plain JAX. The loss
# function returns one loss *per task*; the ordinary loop trains on their sum.


# %%
def init_params(key):
    def dense(key, inputs, outputs):
        kernel = jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs)
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    sizes = {
        "hidden": (144, 128),
        "features": (128, FEATURES),
        "left": (FEATURES, 10),
        "right": (FEATURES, 10),
        "draw": (FEATURES, 144),
    }
    keys = jax.random.split(key, len(sizes))
    layers = {name: dense(key, *sizes[name]) for name, key in zip(sizes, keys)}
    heads = {name: layers.pop(name) for name in ("left", "right", "draw")}
    return {"trunk": layers, "heads": heads}


def apply(params, x):
    dense = lambda layer, x: x @ layer["kernel"] + layer["bias"]
    x = jax.nn.relu(dense(params["trunk"]["hidden"], x))
    x = jnp.tanh(dense(params["trunk"]["features"], x))
    return {name: dense(head, x) for name, head in params["heads"].items()}


def task_losses(params, batch):
    x, left, right = batch
    out = apply(params, x)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return {
        "draw": jnp.mean((out["draw"] - x) ** 2) / jnp.var(x, axis=0).mean(),
        "left": cross_entropy(out["left"], left).mean(),
        "right": cross_entropy(out["right"], right).mean(),
    }


def scores(params):
    x, left, right = test_batch
    out = apply(params, x)
    explained = 1 - task_losses(params, test_batch)["draw"]
    read = lambda head, label: (out[head].argmax(-1) == label).mean()
    return 100 * jnp.stack([explained, read("left", left), read("right", right)])


# %%
tx = optax.adamw(LEARNING_RATE)


@jax.jit
def plain_step(carry, key):
    params, opt_state = carry
    batch = sample(key, train, BATCH_SIZE)
    loss_fn = lambda params: sum(task_losses(params, batch).values())
    grads = jax.grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None


params = init_params(jax.random.key(0))
keys = jax.random.split(jax.random.key(2), STEPS)
(plain_params, _), _ = jax.lax.scan(plain_step, (params, tx.init(params)), keys)
print("drawing, left, right (%):", scores(plain_params).round(1))

# %% [markdown]
# ## Do the tasks conflict at all?
#
# Look before you pay. `value_and_task_grads` returns the gradient of every task, with
# one leading *task axis* on each leaf. All that matters about them is in their T x T
# Gram matrix. The mask says which parameters are shared: only there can tasks collide.


# %%
shared = {"trunk": True, "heads": False}
task_grads = optax_mtl.value_and_task_grads(task_losses, shared=shared)


@jax.jit
def look(params, key):
    losses, grads = task_grads(params, sample(key, train, BATCH_SIZE))
    return optax_mtl.conflicts(optax_mtl.gram(grads["trunk"]), names=losses)


report = look(init_params(jax.random.key(0)), keys[0])
print(report)

# %% [markdown]
# Over a whole training run with the plain sum:


# %%
def plain_step_and_look(carry, key):
    report = look(carry[0], key)
    return plain_step(carry, key)[0], report


_, reports = jax.lax.scan(plain_step_and_look, (params, tx.init(params)), keys)
pairs = list(itertools.combinations(range(len(report.names)), 2))
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for i, j in pairs:
    name = f"{report.names[i]}, {report.names[j]}"
    cosine = reports.cosines[:, i, j]
    smooth = np.convolve(cosine, np.full(20, 1 / 20), mode="valid")
    axes.plot(smooth, label=f"{name}: negative in {(cosine < 0).mean():.0%} of steps")
axes.axhline(0, color="0.3", lw=0.8)
axes.set(xlabel="step", ylabel="cosine", title="Gradients of two tasks in the trunk")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Negative cosines: a step that helps one task harms the other, to first order. If
# yours stay above zero and the norms are alike, stop here and keep the plain sum.
#
# ## The resolved loop
#
# Two lines change: the gradients keep their task axis, and a method comes first in
# the chain. The heads belong to one task each, so `optax.partition` leads them around
# the method; their gradients came back without a task axis and cost nothing more.


# %%
labels = {"trunk": "shared", "heads": "heads"}


def resolved(method):
    routes = {"shared": method, "heads": optax.identity()}
    return optax.chain(optax.partition(routes, labels), optax.adamw(LEARNING_RATE))


# On shapes alone: a chain that cannot work is an error here, and says why.
optax_mtl.check(resolved(optax_mtl.upgrad()), params, num_tasks=3, shared=shared)


def train_with(method):
    tx = resolved(method)

    def step(carry, key):
        params, opt_state = carry
        batch = sample(key, train, BATCH_SIZE)
        losses, grads = task_grads(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), scores(params)

    _, curve = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys))()
    return curve


methods = {
    "sum": optax_mtl.linear(),
    "pcgrad": optax_mtl.pcgrad(),
    "cagrad": optax_mtl.cagrad(),
    "nash_mtl": optax_mtl.nash_mtl(),
}
curves = {name: train_with(method) for name, method in methods.items()}

figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
titles = ("drawing, variance explained (%)", "left digit (%)", "right digit (%)")
for task, (axes, title) in enumerate(zip(panels, titles)):
    late = np.stack([curve[STEPS // 3 :, task] for curve in curves.values()])
    for name, curve in curves.items():
        axes.plot(curve[:, task], lw=0.8, label=name)
    axes.set(title=title, xlabel="step", xlim=(STEPS // 3, STEPS))
    axes.set_ylim(late.min(), late.max() + 1)
panels[1].legend(frameon=False, loc="lower right")
plt.show()
for name, curve in curves.items():
    print(f"{name:>8}", curve[-1].round(1))

# %% [markdown]
# One seed is an anecdote: `make demo` in the repository trains more methods over
# several seeds, beside sums with tuned weights, and times them.
#
# ## When memory matters
#
# A method that reads only the Gram matrix does not need the T gradients at all.
# With `mode="gram"`, `value_and_grad` measures the matrix by one pull-back and one
# push-forward per task, and then makes a single pull-back with the weights. The result
# is the same, and the memory does not grow with T.

# %%
method = optax_mtl.cagrad()
batch = sample(jax.random.key(3), train, BATCH_SIZE)
losses, grads = optax_mtl.value_and_task_grads(task_losses)(params, batch)
stacked, _ = method.update(grads, method.init(params))

small = optax_mtl.value_and_grad(task_losses, method, mode="gram")
losses, lean, _ = small(params, small.init(params), batch)
difference = optax.tree.norm(optax.tree.sub(stacked, lean)) / optax.tree.norm(stacked)
print(f"relative difference: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# Every method is in the table `optax_mtl.METHODS`, with what it reads and what it
# promises:

# %%
for name, entry in optax_mtl.METHODS.items():
    print(
        f"{name:24} {', '.join(sorted(entry.reads)) or 'nothing':18} {entry.paper[0]}"
    )
