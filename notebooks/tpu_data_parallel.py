# ---
# jupyter:
#   accelerator: TPU
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
# # Resolved gradients on all devices
#
# The batch is split over the devices, the parameters are on each of them. First with
# a mesh and a sharded `jit`, then the same step with `pmap`, on any number of TPU
# cores or GPUs, or on the cores of a CPU. The one rule: a method must see the gradients
# of the tasks *averaged over the devices*, since the Gram matrix of a mean is not the
# mean of Gram matrices.

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
# @title Settings
import os

STEPS = 200  # @param {type:"integer"}
BATCH_PER_DEVICE = 64  # @param {type:"integer"}
WIDTH = 256  # @param {type:"integer"}
CPU_DEVICES = min(os.cpu_count() or 1, 8)  # @param

# %%
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import optax_mtl

# Without an accelerator, each core of the CPU is a device. An all-reduce that waits for
# the other devices holds a thread, and two of one device can hold those that the others
# need to arrive: XLA gets more of them. Both before the first use of JAX!
os.environ.setdefault("NPROC", str(8 * CPU_DEVICES))
jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
platform = jax.devices()[0].platform
print("JAX running on", jax.device_count(), platform.upper(), "devices")

# %% [markdown]
# ## Data, model, losses
#
# Two handwritten digits on one canvas; the tasks are to read the left one, to read
# the right one, and to draw the canvas again from 16 features. The matrix products
# are in bfloat16 on TPU; parameters, losses and the Gram matrix stay in float32.

# %%
digits = load_digits()
images, labels = (digits.images / 16).astype(np.float32), digits.target
batch_size = BATCH_PER_DEVICE * jax.device_count()  # Divides evenly, always.
compute_dtype = jnp.bfloat16 if platform == "tpu" else jnp.float32


def sample(rng):
    i, j = rng.integers(0, len(labels), (2, batch_size))
    left = np.pad(images[i], ((0, 0), (0, 4), (0, 4)))
    right = np.pad(images[j], ((0, 0), (4, 0), (4, 0)))
    canvas = np.maximum(left, right).reshape(batch_size, -1)
    return {"canvas": canvas, "left": labels[i], "right": labels[j]}


def init_params(key):
    def dense(key, inputs, outputs):
        kernel = jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs)
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    keys = jax.random.split(key, 5)
    return {
        "trunk": [dense(keys[0], 144, WIDTH), dense(keys[1], WIDTH, 16)],
        "left": dense(keys[2], 16, 10),
        "right": dense(keys[3], 16, 10),
        "draw": dense(keys[4], 16, 144),
    }


def task_losses(params, batch):
    def dense(layer, x):
        kernel = layer["kernel"].astype(compute_dtype)
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32) + layer["bias"]

    x = jnp.tanh(dense(params["trunk"][0], batch["canvas"].astype(compute_dtype)))
    x = jnp.tanh(dense(params["trunk"][1], x.astype(compute_dtype)))
    x = x.astype(compute_dtype)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.stack(
        [
            cross_entropy(dense(params["left"], x), batch["left"]).mean(),
            cross_entropy(dense(params["right"], x), batch["right"]).mean(),
            20 * jnp.mean((dense(params["draw"], x) - batch["canvas"]) ** 2),
        ]
    )


# %% [markdown]
# The method resolves the trunk; each head has one task only.

# %%
shared = {"trunk": True, "left": False, "right": False, "draw": False}
route = {name: "shared" if value else "heads" for name, value in shared.items()}
tx = optax.chain(
    optax.partition({"shared": optax_mtl.cagrad(), "heads": optax.identity()}, route),
    optax.adamw(2e-3),
)
shapes = jax.eval_shape(init_params, jax.random.key(0))
optax_mtl.check(tx, shapes, num_tasks=3, shared=shared)  # Says what cannot work.
task_grads = optax_mtl.value_and_task_grads(task_losses, shared=shared)


def step(params, opt_state, batch):
    losses, grads = task_grads(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
    return optax.apply_updates(params, updates), opt_state, losses


# %% [markdown]
# ## A mesh and a sharded `jit`
#
# Nothing in the step mentions devices. The batch is split over the mesh, the
# parameters are replicated, and the compiler averages the gradients: each loss is a
# mean over the whole batch, so `jacrev` of it is what the method must see.

# %%
mesh = jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
)
replicated = NamedSharding(mesh, PartitionSpec())
split = NamedSharding(mesh, PartitionSpec("data"))


def timed(run, steps):
    """Seconds per step; the first step compiles, and is timed apart."""
    rng = np.random.default_rng(0)
    batches = [sample(rng) for _ in range(steps)]
    start = time.perf_counter()
    history = [jax.block_until_ready(run(batches[0]))]
    first = time.perf_counter() - start
    start = time.perf_counter()
    for batch in batches[1:]:
        history.append(run(batch))
    jax.block_until_ready(history[-1])
    seconds = (time.perf_counter() - start) / max(steps - 1, 1)
    print(f"first step {first:.2f} s, then {1e3 * seconds:.2f} ms a step")
    return np.stack(history)


jit_step = jax.jit(step, donate_argnums=(0, 1))
params = jax.device_put(init_params(jax.random.key(0)), replicated)
opt_state = jax.device_put(tx.init(params), replicated)


def run_jit(batch):
    global params, opt_state
    batch = jax.device_put(batch, split)
    params, opt_state, losses = jit_step(params, opt_state, batch)
    return losses


jit_losses = timed(run_jit, STEPS)
jit_params = jax.device_get(params)

# %% [markdown]
# ## The same with `pmap`
#
# Each device computes the task gradients of its own part of the batch; one `pmean`
# averages losses and stacked gradients *before* the method. The random keys of a
# method are part of its replicated state, so every device makes the same choices.


# %%
@functools.partial(jax.pmap, axis_name="data", donate_argnums=(0, 1))
def pmap_step(params, opt_state, batch):
    losses, grads = jax.lax.pmean(task_grads(params, batch), "data")
    updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
    return optax.apply_updates(params, updates), opt_state, losses


per_device = lambda x: x.reshape(jax.device_count(), -1, *x.shape[1:])
same_seed = jnp.zeros(jax.device_count(), int)
params = jax.pmap(lambda seed: init_params(jax.random.key(seed)))(same_seed)
opt_state = jax.pmap(tx.init)(params)


def run_pmap(batch):
    global params, opt_state
    batch = jax.tree.map(per_device, batch)
    params, opt_state, losses = pmap_step(params, opt_state, batch)
    return losses[0]


pmap_losses = timed(run_pmap, STEPS)
pmap_params = jax.tree.map(lambda x: np.asarray(x[0]), params)

# %% [markdown]
# ## Both are one training run
#
# In the first steps the losses agree to rounding. Training may amplify it: how far the
# two are apart later is on the right.

# %%
differences = np.abs(jit_losses - pmap_losses)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for task, name in enumerate(("left", "right", "draw")):
    left.plot(jit_losses[:, task], label=name)
right.plot(differences.max(1), ".", ms=3)
left.set(xlabel="step", title="losses with jit", ylim=(0, None))
right.set(xlabel="step", title="largest difference from those with pmap")
left.legend(frameon=False)
plt.show()

early = min(5, STEPS)
difference = differences[:early].max()
print(f"largest difference of the losses in the first {early} steps: {difference:.1e}")
assert difference < (5e-2 if platform == "tpu" else 1e-4)

# %% [markdown]
# ## How much do the tasks conflict?
#
# The same sharded gradients answer it; the Gram matrix is one small all-reduce.


# %%
@jax.jit
def look(params, batch):
    _, grads = task_grads(params, batch)
    return optax_mtl.conflicts(optax_mtl.gram(grads["trunk"]))


params = jax.device_put(jit_params, replicated)
batch = jax.device_put(sample(np.random.default_rng(1)), split)
print("cosines:\n", look(params, batch).cosines.round(2))
