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
# # Write a method of your own
#
# A method is a function from a small matrix, or from the losses, to one weight for each
# task. We write one in three lines, let the library's own tests break it, repair it,
# give it a memory, and race it against the sum. A minute on a CPU.

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
import optax

import optax_mtl
from optax_mtl import plots, testing

print("JAX running on", jax.devices()[0].platform.upper())

# %%
# @title Settings
STEPS = 600  # @param {type:"integer"}
SEEDS = 3  # @param {type:"integer"}
LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2]
if os.environ.get("FAST"):  # The tests run every cell, briefly.
    STEPS, SEEDS = 20, 2

# %% [markdown]
# ## Three lines
#
# `gram` holds the inner products of the gradients: `gram[i, j]` is that of tasks i and
# j, and the diagonal the squared norms. The idea: every gradient has length one, so
# that none drowns the others.


# %%
def unit_weights(gram):
    return 1 / jnp.sqrt(jnp.diagonal(gram))


method = optax_mtl.from_gram(unit_weights)
updates = jnp.array([[3.0, 4.0], [0.0, 0.1]])
print(method.update(updates, method.init(None))[0])

# %% [markdown]
# That is already a link of an Optax chain, in every way to get gradients, under `jit`,
# on many devices. But is it right? The tests that every method of the library passes
# are yours, too.

# %%
try:
    testing.check_contract(lambda num_tasks: method)
except AssertionError as error:
    print(error)

# %% [markdown]
# A task without a gradient, as where its labels are missing in a batch, divides by
# zero. It is to count as absent.


# %%
def unit_weights(gram):
    squares = jnp.diagonal(gram)
    exists = squares > 0
    return jnp.where(exists, 1 / jnp.sqrt(jnp.where(exists, squares, 1)), 0)


unit = lambda num_tasks: optax_mtl.from_gram(unit_weights)
testing.check_contract(unit)

# %% [markdown]
# Silence: it holds. Now for promises, of which nobody has to keep any. Which hold for
# *any* gradients, random, stationary or badly scaled?

# %%
for promise in testing.PROMISES:
    try:
        testing.check_promise(promise, unit)
        print(f"{promise:16} holds")
    except AssertionError as error:
        print(f"{promise:16} {str(error).split('. ')[0][:90]}")

# %% [markdown]
# ## A memory
#
# The norms of one batch are noisy. `from_state` carries a tree of arrays from step to
# step: here a running average of the squared norms, which starts with the first.


# %%
def averaged(num_tasks, decay=0.9):
    def step(state, gram):
        squares = jnp.diagonal(gram)
        average = jnp.where(state > 0, decay * state + (1 - decay) * squares, squares)
        state = jnp.where(squares > 0, average, state)  # An absent task keeps its own.
        weights = jax.lax.rsqrt(jnp.where(state > 0, state, 1))
        return jnp.where(squares > 0, weights, 0), state

    init = lambda: jnp.zeros(num_tasks)
    return optax_mtl.from_state(init, step, num_tasks, reads=["gram"])


testing.check_contract(averaged)

# %% [markdown]
# ## Does it help?
#
# Three targets of one network, of different units: a race against the plain sum, eight
# weightings of it, and a method of the catalogue, each with four learning rates.

# %%
TARGETS = jax.random.normal(jax.random.key(7), (16, 3))
UNITS = jnp.array([1.0, 10.0, 0.1])


def init_fn(key):
    first, second, heads = jax.random.split(key, 3)
    return {
        "trunk/1": jax.random.normal(first, (16, 64)) / 4,
        "trunk/2": jax.random.normal(second, (64, 64)) / 8,
        "heads": jax.random.normal(heads, (64, 3)) / 8,
    }


def batch_fn(key, step):
    x = jax.random.normal(jax.random.fold_in(key, step), (64, 16))
    return x, jnp.tanh(x @ TARGETS) * UNITS


def losses_fn(params, batch):
    x, y = batch
    features = jnp.tanh(jnp.tanh(x @ params["trunk/1"]) @ params["trunk/2"])
    errors = ((features @ params["heads"] - y) ** 2).mean(axis=0)
    return {"metres": errors[0], "centimetres": errors[1], "decametres": errors[2]}


methods = {
    "unit": unit,
    "averaged": averaged,
    "nash_mtl": lambda num_tasks: optax_mtl.nash_mtl(),
}
result = optax_mtl.compare(
    losses_fn,
    init_fn,
    batch_fn,
    methods,
    optimizer=optax.adam,
    learning_rates=LEARNING_RATES,
    seeds=SEEDS,
    num_steps=STEPS,
    shared=lambda path: "trunk" in path,
)
print(result.table())
print()
print(result.verdict())

# %%
plots.compare(result)
plt.show()

# %% [markdown]
# What the race says is above, whichever way it falls. To share a method with others,
# the steps from here to a row of the catalogue are in `CONTRIBUTING.md`.
