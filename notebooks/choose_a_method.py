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
# # Does any method help on your problem?
#
# Gains of multi-task methods often vanish against a sum whose weights were tuned. So we
# race them: six methods, the plain sum and eight weightings of it, each with four
# learning rates and three seeds, chosen on data that are not reported. Put your own
# problem in the place of the ten lines below. Under two minutes on a CPU.

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
import optax

import optax_mtl
from optax_mtl import plots

print("JAX running on", jax.devices()[0].platform.upper())

# %%
# @title Settings
STEPS = 600  # @param {type:"integer"}
SEEDS = 3  # @param {type:"integer"}
METHODS = ["upgrad", "pcgrad", "cagrad", "nash_mtl", "imtl_l", "uncertainty_weighting"]
LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2]
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS, SEEDS, METHODS = 20, 2, METHODS[-2:]

# %% [markdown]
# ## The problem
#
# Three targets of one network, of different size and unit. `init_fn` makes parameters,
# `batch_fn` a batch for a step, `losses_fn` one loss for each task. This batch is drawn
# anew each time; with a fixed data set, pass `evaluate=` and `select=` for two splits.

# %%
TARGETS = jax.random.normal(jax.random.key(7), (16, 3))
UNITS = jnp.array([1.0, 10.0, 0.1])


def init_fn(key):
    first, second, heads = jax.random.split(key, 3)
    trunk = (
        jax.random.normal(first, (16, 64)) / 4,
        jax.random.normal(second, (64, 64)) / 8,
    )
    return {"trunk": trunk, "heads": jax.random.normal(heads, (64, 3)) / 8}


def batch_fn(key, step):
    x = jax.random.normal(jax.random.fold_in(key, step), (64, 16))
    return x, jnp.tanh(x @ TARGETS) * UNITS


def losses_fn(params, batch):
    x, y = batch
    features = jnp.tanh(jnp.tanh(x @ params["trunk"][0]) @ params["trunk"][1])
    errors = ((features @ params["heads"] - y) ** 2).mean(axis=0)
    return {"metres": errors[0], "centimetres": errors[1], "decametres": errors[2]}


shared = lambda path: "trunk" in path

# %% [markdown]
# ## Look first
#
# Do the tasks conflict at all, at the start?

# %%
params, batch = init_fn(jax.random.key(0)), batch_fn(jax.random.key(1), 0)
losses, grads = optax_mtl.value_and_task_grads(losses_fn, shared=shared)(params, batch)
report = optax_mtl.conflicts(optax_mtl.gram(grads["trunk"]), names=losses)
print(report)
print(optax_mtl.recommend(report))

# %% [markdown]
# ## The race

# %%
result = optax_mtl.compare(
    losses_fn,
    init_fn,
    batch_fn,
    METHODS,
    optimizer=optax.adam,
    learning_rates=LEARNING_RATES,
    seeds=SEEDS,
    num_steps=STEPS,
    shared=shared,
)
print(result.table())

# %%
plots.compare(result)
# %% [markdown]
# ## The verdict

# %%
print(result.verdict())
