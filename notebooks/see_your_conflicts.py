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
# # See the conflicts of your own model
#
# Before any method: do the gradients of your tasks oppose each other at all, where in
# the model, and when? Put your own losses in the place of one cell, and run the rest as
# it is. A minute on a CPU.

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
STEPS = 1500  # @param {type:"integer"}
BATCH = 128  # @param {type:"integer"}
LEARNING_RATE = 3e-3  # @param {type:"number"}
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS = 40

# %% [markdown]
# ## Your problem
#
# Parameters, a batch, and a dict with one loss for each task. Here: which digit it is,
# whether it is even, and the image itself through a narrow layer, from the 1,797 digits
# that scikit-learn ships.

# %%
images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
labels = jnp.asarray(labels)


def init(key):
    shapes = {
        "trunk/1": (64, 96),
        "trunk/2": (96, 96),
        "trunk/3": (96, 12),
        "heads/digit": (12, 10),
        "heads/even": (12, 1),
        "heads/image": (12, 64),
    }
    keys = jax.random.split(key, len(shapes))
    scaled = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    return {name: scaled(k, shape) for k, (name, shape) in zip(keys, shapes.items())}


def draw(key):
    rows = jax.random.randint(key, (BATCH,), 0, len(images))
    return images[rows], labels[rows]


def losses_fn(params, batch):
    x, y = batch
    h = jax.nn.gelu(x @ params["trunk/1"])
    h = jax.nn.gelu(h @ params["trunk/2"])
    h = jnp.tanh(h @ params["trunk/3"])
    digit = optax.softmax_cross_entropy_with_integer_labels(
        h @ params["heads/digit"], y
    )
    even = optax.sigmoid_binary_cross_entropy((h @ params["heads/even"])[:, 0], y % 2)
    image = 10 * (h @ params["heads/image"] - x) ** 2
    return {"digit": digit.mean(), "even": even.mean(), "image": image.mean()}


shared = lambda path: path.startswith("trunk")  # What all tasks go through.

# %% [markdown]
# ## One look
#
# Three lines. Only what the tasks share can collide, so we ask for the trunk alone.

# %%
params, batch = init(jax.random.key(0)), draw(jax.random.key(1))
losses, grads = optax_mtl.value_and_task_grads(losses_fn)(params, batch)
trunk = {name: grads[name] for name in params if shared(name)}
report = optax_mtl.conflicts(optax_mtl.gram(trunk), names=losses)
print(report)

# %% [markdown]
# ## Over training, without touching the loop
#
# `record_conflicts` is a link in front of the method, here in front of the plain sum.
# For each parameter on its own there is `per_group`. The training loop is the one that
# you have; the record comes out of the state of the chain.

# %%
tx = optax.chain(
    optax_mtl.record_conflicts(num_tasks=3, decay=0.95),
    optax_mtl.per_group(optax_mtl.record_conflicts(3, decay=0.95), lambda path: path),
    optax_mtl.linear(),
    optax.adam(LEARNING_RATE),
)
grads_fn = optax_mtl.value_and_task_grads(losses_fn)


@jax.jit
def train(params, key):
    def step(carry, key):
        params, state = carry
        losses, grads = grads_fn(params, draw(key))
        updates, state = tx.update(grads, state, params, losses=losses)
        carry = optax.apply_updates(params, updates), state
        of_all, *_ = optax_mtl.recorded(state).values()
        return carry, (losses, of_all.mean)

    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, STEPS))


(trained, state), (history, means) = train(params, jax.random.key(2))
names = list(history)
print({name: round(float(loss[-50:].mean()), 4) for name, loss in history.items()})

# %%
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
plots.losses(np.stack(list(history.values()), axis=1), names=names, ax=axes[0])
plots.conflict(means.cosines, names=names, ax=axes[1])
plots.weights(means.norms, names=names, ax=axes[2]).set_ylabel("norm of the gradient")
plt.show()

# %% [markdown]
# ## Where in the model
#
# The same record, by parameter, over the last steps. A head is read by its own task
# alone, so that nothing can collide there.

# %%
records = optax_mtl.recorded(state, names=names)
layers = {name: record for name, record in records.items() if shared(name)}
plots.groups([x.mean.cosines for x in layers.values()], list(layers), names)
plt.show()
for name, record in layers.items():
    share = record.conflicting[np.triu_indices(3, 1)]
    print(
        f"{name}: pairs in conflict in {np.array2string(share, precision=2)} of steps"
    )

# %% [markdown]
# ## Who moves the model
#
# The share of each task in the update of the plain sum, and the cosine of the update
# with the gradient of each task: a negative one says that the step raises its loss.

# %%
_, grads = grads_fn(trained, draw(jax.random.key(3)))
gram = optax_mtl.gram({name: grads[name] for name in params if shared(name)})
for name, share, cosine in zip(
    names, optax_mtl.dominance(gram), optax_mtl.update_cosines(gram)
):
    print(f"{name:6} has {share:5.0%} of the update; cosine with it {cosine:+.2f}")
print(f"\n{optax_mtl.recommend(optax_mtl.conflicts(gram, names=names))}")

# %% [markdown]
# What it says of this model is above, and it may be that there is nothing to repair. If
# there is, `choose_a_method` races methods on the same three functions, against the
# plain sum and tuned weights of it.
