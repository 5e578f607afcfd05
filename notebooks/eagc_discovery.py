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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/optax_mtl/blob/main/notebooks/eagc_discovery.ipynb)
#
# # Category discovery: gradients entangled, then untangled
#
# Some images have labels, of *known* classes. The others show known classes as well
# as *novel* ones, and a model is to sort them all. What it learns from labels and what
# it learns without them meet in the same features, and their gradients entangle. We
# measure that on real digits and then let EAGC (energy-aware gradient coordination,
# CVPR 2026) act on it. Runs on CPU, GPU or TPU in about two minutes.

# %%
# Installs the library on Colab, and nothing that could replace Colab's own JAX.
import subprocess
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/OWNER/optax_mtl"
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
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import optax_mtl

print("JAX running on", jax.devices()[0].platform.upper())

# %%
# @title Settings
REFERENCE_STEPS = 500  # @param {type:"integer"}
STEPS = 1500  # @param {type:"integer"}
BATCH_SIZE = 128  # @param {type:"integer"}
LEARNING_RATE = 1e-3  # @param {type:"number"}
STRENGTH = 0.5  # @param {type:"number"}
ANCHOR = 0.7  # @param {type:"number"}
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    REFERENCE_STEPS = STEPS = 20

# %% [markdown]
# ## The task
#
# Digits 0 to 4 are known, 5 to 9 novel. Half of the images of known digits keep their
# labels. That there are ten classes is given.

# %%
digits = load_digits()
images = jnp.asarray(digits.images / 16, jnp.float32)
labels = jnp.asarray(digits.target)
known_rows = np.flatnonzero(digits.target < 5)
shuffled = np.random.default_rng(0).permutation(known_rows)
labelled = np.sort(shuffled[: len(known_rows) // 2])
unlabelled = np.setdiff1d(np.arange(len(labels)), labelled)
novel = np.flatnonzero(digits.target >= 5)
is_labelled = jnp.zeros(len(labels), bool).at[labelled].set(True)
print(f"{len(labelled)} labelled, {len(unlabelled)} unlabelled, {len(novel)} novel")

# %% [markdown]
# A small network in plain JAX: a trunk whose output `z` we call the features, and two
# heads that read them.


# %%
def dense(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def init_params(key):
    k1, k2, k3, k4, k5 = jax.random.split(key, 5)
    return {
        "trunk": [dense(k1, 64, 256), dense(k2, 256, 64)],
        "classes": jax.random.normal(k3, (64, 10)),
        "projector": [dense(k4, 64, 128), dense(k5, 128, 64)],
    }


def mlp(layers, x):
    first, second = layers
    x = jax.nn.relu(x @ first["kernel"] + first["bias"][None])
    return x @ second["kernel"] + second["bias"][None]


def features(params, x):
    return mlp(params["trunk"], x.reshape(len(x), 64))


def normalize(x, axis=-1):
    return x / jnp.linalg.norm(x, axis=axis, keepdims=True)


def classify(params, z):
    return normalize(z) @ normalize(params["classes"], axis=0)


def view(key, x):
    shift_key, noise_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (len(x), 2), -1, 2)
    x = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(x, shifts)
    return x + 0.1 * jax.random.normal(noise_key, x.shape)


def two_views(key, rows):
    return jnp.concatenate([view(k, images[rows]) for k in jax.random.split(key)])


# %% [markdown]
# ## Stage 1: a reference that has seen only labels
#
# It is trained on the labelled images and then frozen.

# %%
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
optimizer = optax.adam(LEARNING_RATE)


def reference_step(carry, key):
    params, state = carry
    draw_key, view_key = jax.random.split(key)
    rows = jax.random.choice(draw_key, jnp.asarray(labelled), (BATCH_SIZE,))
    x, y = two_views(view_key, rows), jnp.tile(labels[rows], 2)

    def loss_fn(params):
        logits = classify(params, features(params, x))[:, :5]
        return cross_entropy(logits / 0.1, y).mean()

    updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
    return (optax.apply_updates(params, updates), state), None


params = init_params(jax.random.key(0))
keys = jax.random.split(jax.random.key(1), REFERENCE_STEPS)
(reference, _), _ = jax.lax.scan(reference_step, (params, optimizer.init(params)), keys)

held_out = np.intersect1d(known_rows, unlabelled)
guess = classify(reference, features(reference, images[held_out]))[:, :5].argmax(1)
print(f"known digits without label: {(guess == labels[held_out]).mean():.1%} right")

# %% [markdown]
# ## Stage 2: where the known classes live
#
# The *conceptor* of the reference's labelled features is a soft projector on the
# subspace that they occupy, and the *energy* of a feature vector is its share in that
# subspace. Known classes should have more of it than novel ones; that is what tells
# EAGC how much of a sample's gradient to leave alone.

# %%
z = features(reference, images)
conceptor = optax_mtl.fit_conceptor(z[labelled], aperture=2.0, relative=True)
energy = optax_mtl.energy_ratio(z, conceptor)
print(f"share of the space taken: {jnp.trace(conceptor) / len(conceptor):.2f}")

figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
for name, rows in ("labelled", labelled), ("known", held_out), ("novel", novel):
    axes.hist(np.asarray(energy[rows]), 40, density=True, alpha=0.5, label=name)
axes.set(xlabel="energy in the subspace of known classes", yticks=[])
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Stage 3: discovery
#
# The objectives of SimGCD in short. With labels: cross-entropy. Without: each view
# predicts the sharpened prediction for the other, predictions must spread over all
# classes, and two views of an image attract each other.


# %%
def supervised_loss(logits, y, has_label):
    losses = cross_entropy(logits / 0.1, y)
    return jnp.where(has_label, losses, 0).sum() / jnp.maximum(has_label.sum(), 1)


def unsupervised_loss(logits, projections):
    teacher = jax.lax.stop_gradient(jax.nn.softmax(logits / 0.05))
    other_view = jnp.roll(teacher, len(logits) // 2, axis=0)
    distillation = cross_entropy(logits / 0.1, other_view) if False else -jnp.mean(
        jnp.sum(other_view * jax.nn.log_softmax(logits / 0.1), 1)
    )
    mean = jax.nn.softmax(logits / 0.1).mean(0)
    spread = jnp.sum(mean * jnp.log(mean))
    p = normalize(projections)
    similarities = jnp.where(jnp.eye(len(p), dtype=bool), -jnp.inf, p @ p.T)
    positives = jnp.roll(jnp.arange(len(p)), len(p) // 2)
    contrast = cross_entropy(similarities, positives).mean()
    return distillation + spread + contrast
