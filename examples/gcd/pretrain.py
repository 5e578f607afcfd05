"""Stage 0: the backbone learns all images without their labels, by contrast."""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import runs
from examples.flags import UserError
from examples.gcd import data, objective, weights
from examples.gcd.config import Config
from examples.gcd.model import PRESETS
from examples.progress import bar, say

SAVE_EVERY = 5  # Epochs.


class State(NamedTuple):
    """What a step changes."""

    params: Any  # Of backbone and projector.
    optimizer: Any


def fit(
    config: Config, backbone: nnx.Module, images: jax.Array, folder: pathlib.Path
) -> None:
    """Trains a backbone in place, to tell views of an image from those of others.

    A run that was interrupted goes on from its last checkpoint, bit for bit. Then
    `pretrained.npz` holds the weights, for `--backbone-weights` of other runs.
    """
    batch_size = config.pretrain_batch_size
    steps_per_epoch = len(images) // batch_size
    if not steps_per_epoch:
        raise UserError(
            f"--pretrain-batch-size {batch_size} is more than the {len(images)} images"
        )
    networks = backbone, _projector(config)
    optimizer, step = _optimizer_and_step(config, nnx.graphdef(networks), len(images))
    params = nnx.state(networks)
    fresh = State(params, optimizer.init(params))
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    with runs.open_checkpoints(folder / "pretraining") as saved:
        start, state = runs.restore(saved, fresh)
        log = runs.Log(folder / "pretraining.csv", ["epoch", "contrast"], last=start)
        epochs = bar(
            range(start, config.pretrain_epochs),
            desc="pretraining",
            initial=start,
            total=config.pretrain_epochs,
            unit="epoch",
        )
        for epoch in epochs:
            losses = []
            for number in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
                state, loss = step(state, images, key, number)
                losses.append(loss)
            loss = float(jnp.stack(losses).mean())
            epochs.set_postfix(contrast=f"{loss:.3f}")
            log.write({"epoch": epoch + 1, "contrast": loss})
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"epoch {epoch + 1} of pretraining: the loss is not finite, as in "
                    f"{log.file}: try a smaller --pretrain-lr"
                )
            if (epoch + 1) % SAVE_EVERY == 0 or epoch + 1 == config.pretrain_epochs:
                runs.save(saved, epoch + 1, state)
                say(f"pretraining, epoch {epoch + 1}: contrast {loss:.3f}")
    nnx.update(networks, state.params)
    weights.save(folder / "pretrained.npz", backbone, images.shape[-1])


def last_epoch(folder: pathlib.Path) -> int | None:
    """Of the checkpoints of this stage; None if there are none."""
    if not (folder / "pretraining").exists():
        return None
    with runs.open_checkpoints(folder / "pretraining") as saved:
        return saved.latest_step()


def _projector(config):
    preset, rngs = PRESETS[config.preset], nnx.Rngs(config.seed + 1)
    return nnx.Sequential(
        nnx.Linear(preset.width, preset.hidden, rngs=rngs),
        nnx.gelu,
        nnx.Linear(preset.hidden, preset.projection, rngs=rngs),
    )


def _optimizer_and_step(config, graph, num_images):
    batch_size = config.pretrain_batch_size
    steps_per_epoch = num_images // batch_size
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.pretrain_lr,
        warmup_steps=steps_per_epoch,
        decay_steps=(1 + config.pretrain_epochs) * steps_per_epoch,
    )
    optimizer = optax.adamw(schedule, weight_decay=1e-2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, key, number):
        order_key, view_key = jax.random.split(key)
        rows = data.in_epochs(order_key, jnp.arange(num_images), number, batch_size)
        x = data.two_views(jax.random.fold_in(view_key, number), images[rows], config)

        def loss_fn(params):
            backbone, projector = nnx.merge(graph, params)
            projections = projector(backbone(x))
            return objective.contrast(projections, config.pretrain_temperature)

        loss, gradient = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    return optimizer, step
