"""Generalized category discovery: SimGCD, with or without gradient coordination.

    python -m examples.gcd.train --method eagc

takes about a minute on a CPU; results are in README.md. Three stages: a reference
model learns the labelled images; its features give the conceptor of the known
classes; a model that starts from it learns all images. Before them, on request, the
backbone learns all images without labels.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import optax_mtl
from examples import runs
from examples.flags import run_program
from examples.gcd import config as config_lib
from examples.gcd import data, model, objective, pretrain, report, weights
from examples.gcd.config import COORDINATED, Config
from examples.progress import bar, in_words, say

STEP_COLUMNS = ["step", "supervised", "unsupervised", "labelled_energy", "gdc", "soc"]
EPOCH_COLUMNS = ["epoch", "all", "old", "new", "soc"]


class Images(NamedTuple):
    """The data, on the device."""

    images: jax.Array
    labels: jax.Array
    is_labelled: jax.Array
    labelled: jax.Array  # Rows of images, and so on.
    unlabelled: jax.Array


class Frozen(NamedTuple):
    """What discovery reads and never changes."""

    reference: Any  # Parameters of the reference's backbone, as far as they train.
    rest: Any  # Parameters that do not train, of model and reference alike.
    conceptor: jax.Array
    key: jax.Array


class State(NamedTuple):
    """What a step of discovery changes."""

    step: jax.Array
    params: Any
    method: Any
    optimizer: Any
    coordinator: optax_mtl.EAGCState


class Experiment(NamedTuple):
    """The functions of stages 2 and 3, for one configuration."""

    # From parameters: the states of method and optimizer.
    init: Callable[[Any], tuple[Any, Any]]
    # From state, frozen, the data and whether to diagnose: one step and its metrics.
    step: Callable[..., tuple[State, dict[str, jax.Array]]]
    # From frozen's reference and rest and images: features of the reference.
    before: Callable[..., jax.Array]
    # From state, frozen and images: features and classes.
    after: Callable[..., tuple[jax.Array, jax.Array]]
    steps_per_epoch: int


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs what the command line says; returns the results."""
    config = config_lib.parse(argv)
    out = pathlib.Path(config.out)
    started = time.time()
    split, images = prepare(config)
    reference = make_reference(config, split)
    experiment = make_experiment(config, split)
    with runs.open_checkpoints(out) as saved:
        last = saved.latest_step()
        started_at = pretrain.last_epoch(out) if last is None else last
        runs.check_settings(out, config, started_at)
        if last is None:
            if config.pretrain == "ssl":
                pretrain.fit(config, reference.backbone, images.images, out)
            train_reference(config, reference, images)
        backbone = nnx.state(reference.backbone)
        state, frozen = start(config, experiment, split, backbone)
        if last is None:
            runs.save(saved, 0, (state, frozen))
        epoch, (state, frozen) = runs.restore(saved, (state, frozen))
        discover(config, experiment, split, images, state, frozen, epoch, saved)

    results = summarize(out)
    say(f"{config.method}: {in_words(results)}")
    say(f"{time.time() - started:.0f} s; logs and figures are in {out}")
    return results


def prepare(config: Config) -> tuple[data.Split, Images]:
    """Loads the data, draws the labelled set and moves all to the device."""
    images, labels = data.load(config.data)
    if config.backbone_weights and images.shape[-1] == 1:
        images = np.repeat(images, weights.channels(config.backbone_weights), axis=-1)
    split = data.make_split(images, labels, config)
    is_labelled = np.zeros(len(split.labels), bool)
    is_labelled[split.labelled] = True
    arrays = (split.images, split.labels, is_labelled)
    rows = (split.labelled, split.unlabelled)
    return split, Images(*map(jnp.asarray, arrays + rows))


def make_reference(config: Config, split: data.Split) -> model.Reference:
    """The model of the known classes, untrained or with the weights given."""
    preset, shape, dtype = _sizes(config, split)
    reference = model.Reference(preset, shape, split.num_known, dtype, config.seed)
    if config.backbone_weights:
        weights.load(reference.backbone, config.backbone_weights)
    return reference


def train_reference(config: Config, reference: model.Reference, images: Images) -> None:
    """Stage 1: trains the reference model in place, on the labelled images only."""
    graph, params, rest = nnx.split(reference, _trains(config), ...)
    init, step, steps_per_epoch = _reference_steps(
        dataclasses.replace(_without_seed(config), method=""),
        graph,
        len(images.labelled),
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    optimizer_state = init(params)
    epochs = bar(range(config.reference_epochs), desc="reference", unit="epoch")
    for epoch in epochs:
        for number in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            params, optimizer_state, loss = step(
                params, optimizer_state, rest, images, key, number
            )
        epochs.set_postfix(loss=f"{loss:.3f}")
    if config.reference_epochs:
        say(f"reference, {config.reference_epochs} epochs: loss {loss:.3f}")
    nnx.update(reference, params)


@functools.cache
def _reference_steps(config, graph, num_labelled):
    batch_size = min(config.reference_batch_size, num_labelled)
    steps_per_epoch = num_labelled // batch_size
    optimizer = _sgd(
        config.reference_lr,
        1e-3 * config.reference_lr,
        config.reference_epochs,
        steps_per_epoch,
        weight_decay=1e-4,
    )

    @jax.jit
    def step(params, optimizer_state, rest, images, key, number):
        order_key, view_key = jax.random.split(key)
        rows = data.in_epochs(order_key, images.labelled, number, batch_size)
        view_key = jax.random.fold_in(view_key, number)
        x = data.two_views(view_key, images.images[rows], config)
        labels = jnp.tile(images.labels[rows], 2)

        def loss_fn(params):
            network = nnx.merge(graph, params, rest)
            logits = network.classifier(network.backbone(x))
            everything = jnp.ones(len(x), bool)
            return objective.supervised_cross_entropy(logits, labels, everything)

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, loss

    return jax.jit(optimizer.init), step, steps_per_epoch


def start(
    config: Config, experiment: Experiment, split: data.Split, backbone: nnx.State
) -> tuple[State, Frozen]:
    """Stage 2: fits the conceptor; discovery starts from the reference backbone."""
    preset, shape, dtype = _sizes(config, split)
    network = model.SimGCD(preset, shape, split.num_classes, dtype, config.seed)
    nnx.update(network.backbone, backbone)
    _, params, rest = nnx.split(network, _trains(config), ...)
    # A copy, since the state is donated to each step and the reference stays.
    reference, params = params["backbone"], jax.tree.map(jnp.copy, params)
    z = in_batches(
        lambda x: experiment.before(reference, rest, x), split.images[split.labelled]
    )
    conceptor = optax_mtl.fit_conceptor(
        jnp.asarray(z), config.aperture, relative=config.relative_aperture
    )
    energy = optax_mtl.energy_ratio(z, conceptor).mean()
    method_state, optimizer_state = experiment.init(params)
    state = State(
        step=jnp.zeros([], jnp.int32),
        params=params,
        method=method_state,
        optimizer=optimizer_state,
        coordinator=optax_mtl.EAGCState(energy),
    )
    return state, Frozen(reference, rest, conceptor, jax.random.key(config.seed))


def make_experiment(config: Config, split: data.Split) -> Experiment:
    """The functions of stages 2 and 3; runs that differ in the seed share them."""
    _sizes(config, split)
    return _make_experiment(
        _without_seed(config), split.images.shape, split.num_classes
    )


@functools.cache
def _make_experiment(config, shape, num_classes):
    preset, dtype = model.PRESETS[config.preset], jnp.dtype(config.dtype)
    network = model.SimGCD(preset, shape[1:], num_classes, dtype, config.seed)
    backbone_graph = nnx.graphdef(network.backbone)
    graph = nnx.split(network, _trains(config), ...)[0]
    projects, aligns = COORDINATED.get(config.method, (False, False))
    method, scale = _method(config.method)
    steps_per_epoch = max(1, shape[0] // config.batch_size)
    sgd = functools.partial(
        _sgd,
        lr_min=1e-3 * config.lr,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        weight_decay=config.weight_decay,
    )
    optimizer = optax.partition(
        {"backbone": sgd(config.backbone_lr), "heads": sgd(config.lr)}, _part
    )

    def reference_features(reference, rest, x):
        # What does not train is one with the model's, so that XLA computes it once.
        rest = rest.get("backbone", nnx.State({}))
        return nnx.merge(backbone_graph, reference, rest)(x)

    @jax.jit
    def before(reference, rest, images):
        return reference_features(reference, rest, data.plain(images))

    @jax.jit
    def after(state, frozen, images):
        network = nnx.merge(graph, state.params, frozen.rest)
        z = network.backbone(data.plain(images))
        return z, jnp.argmax(network.heads(z)[0], -1)

    @jax.jit
    def init(params):
        method_state = None if method is None else method.init(params)
        return method_state, optimizer.init(params)

    @functools.partial(jax.jit, static_argnames="diagnose", donate_argnums=0)
    def step(state, frozen, images, diagnose=False):
        draw_key, view_key = jax.random.split(
            jax.random.fold_in(frozen.key, 2 + state.step)
        )
        rows = data.draw(
            draw_key, images.labelled, images.unlabelled, config.batch_size
        )
        x = data.two_views(view_key, images.images[rows], config)
        labels = jnp.tile(images.labels[rows], 2)
        labelled = jnp.tile(images.is_labelled[rows], 2)
        temperature = objective.teacher_temperature(
            state.step // steps_per_epoch, config.teacher_warmup_epochs
        )

        def losses_fn(params):
            network = nnx.merge(graph, params, frozen.rest)
            z = network.backbone(x)
            coordinator = state.coordinator
            if projects or aligns:
                weight, coordinator = optax_mtl.eagc_weights(
                    z,
                    labelled,
                    frozen.conceptor,
                    coordinator,
                    strength=config.strength * projects,
                )
                reference = z
                if aligns:
                    reference = reference_features(frozen.reference, frozen.rest, x)
                z = optax_mtl.coordinate(
                    z,
                    conceptor=frozen.conceptor,
                    weight=weight,
                    reference=reference,
                    labelled=labelled,
                    anchor=config.anchor * aligns,
                )
            logits, projections = network.heads(z)
            if config.objective == "rankstats":
                supervised, unsupervised = objective.rank_statistics(
                    z, logits, labels, labelled
                )
            else:
                supervised, unsupervised = objective.simgcd(
                    logits,
                    projections,
                    labels,
                    labelled,
                    temperature,
                    config.entropy_weight,
                )
            share = config.supervised_weight
            losses = jnp.stack([share * supervised, (1 - share) * unsupervised])
            return losses, coordinator

        if method is None:
            losses, pull_back, coordinator = jax.vjp(
                losses_fn, state.params, has_aux=True
            )
            (gradient,) = pull_back(jnp.ones(2))
            method_state = None
            (supervised_gradient,) = pull_back(jnp.array([1.0, 0.0]))
        else:
            (losses, coordinator), updates = optax_mtl.value_and_task_grads(
                losses_fn, has_aux=True
            )(state.params)
            supervised_gradient = jax.tree.map(lambda g: g[0], updates)
            gradient, method_state = method.update(
                updates, state.method, state.params, losses=losses
            )
            gradient = jax.tree.map(lambda g: scale * g, gradient)

        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer, state.params
        )
        metrics = {
            "step": state.step,
            "supervised": losses[0],
            "unsupervised": losses[1],
            "labelled_energy": coordinator.labelled_energy,
        }
        if diagnose:
            last = lambda tree: tree["backbone"]["blocks"][preset.depth - 1]
            metrics["gdc"] = report.gradient_deviation(
                last(supervised_gradient), last(gradient)
            )
        state = State(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            method=method_state,
            optimizer=optimizer_state,
            coordinator=coordinator,
        )
        return state, metrics

    return Experiment(init, step, before, after, steps_per_epoch)


def discover(
    config: Config,
    experiment: Experiment,
    split: data.Split,
    images: Images,
    state: State,
    frozen: Frozen,
    epoch: int,
    saved: ocp.CheckpointManager,
) -> None:
    """Stage 3: trains from `epoch` on, with logs, checkpoints and figures."""
    out = pathlib.Path(config.out)
    per_epoch = experiment.steps_per_epoch
    steps = runs.Log(out / "steps.csv", STEP_COLUMNS, last=epoch * per_epoch - 1)
    epochs = runs.Log(out / "epochs.csv", EPOCH_COLUMNS, last=epoch)
    board = None
    if config.tensorboard:
        board = runs.tensorboard(out, epoch * per_epoch)

    numbers = bar(range(epoch, config.epochs), desc=config.method, unit="epoch")
    for epoch in numbers:
        pending = []
        for number in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            diagnose = number < config.diagnose_steps
            state, metrics = experiment.step(state, frozen, images, diagnose=diagnose)
            if diagnose and number % config.soc_every == 0:
                metrics["soc"] = overlap(experiment, split, state, frozen)
            pending.append(metrics)
        rows = [{k: float(v) for k, v in row.items()} for row in pending]
        for row in rows:
            steps.write(row)
            if not math.isfinite(row["supervised"] + row["unsupervised"]):
                raise FloatingPointError(
                    f"the losses of step {row['step']:.0f} are not finite, as in "
                    f"{steps.file}: try a smaller --lr or --backbone-lr"
                )

        done = epoch + 1
        if done % config.save_every == 0 or done == config.epochs:
            row = {
                "epoch": done,
                **evaluate(experiment, split, state, frozen),
                "soc": overlap(experiment, split, state, frozen),
            }
            epochs.write(row)
            rows.append(row)
            accuracies = {k: row[k] for k in ("all", "old", "new")}
            say(f"epoch {done} of {config.epochs}: {in_words(accuracies)}")
            runs.save(saved, done, (state, frozen))
        if board is not None:
            for row in rows:
                for name, value in row.items():
                    board.add_scalar(
                        name, value, int(row.get("step", done * per_epoch))
                    )
    if board is not None:
        board.close()

    report.plot_curves(out, config.method)
    before = in_batches(
        lambda x: experiment.before(frozen.reference, frozen.rest, x), split.images
    )
    after, _ = in_batches(lambda x: experiment.after(state, frozen, x), split.images)
    report.plot_features(out, before, after, split.labels, split.num_known)


def evaluate(
    experiment: Experiment, split: data.Split, state: State, frozen: Frozen
) -> dict[str, float]:
    """Accuracy on the unlabelled images that it trained on (transductive)."""
    _, classes = in_batches(
        lambda x: experiment.after(state, frozen, x), split.images[split.unlabelled]
    )
    truth = split.labels[split.unlabelled]
    return report.accuracy(truth, classes, split.num_known)


def overlap(
    experiment: Experiment, split: data.Split, state: State, frozen: Frozen
) -> float:
    """SOC of the features of labelled and of novel images."""
    features = lambda x: experiment.after(state, frozen, x)[0]
    known = in_batches(features, split.images[split.labelled])
    novel = in_batches(features, split.images[split.novel])
    return report.subspace_overlap(known, novel)


def in_batches(fn: Callable, images: np.ndarray, size: int = 256) -> Any:
    """Applies a function to many images, some at a time, always of one shape."""
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padding = [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)]
        result = fn(np.pad(batch, padding))
        keep = slice(len(batch))
        parts.append(jax.tree.map(lambda x, keep=keep: np.asarray(x)[keep], result))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def summarize(out: pathlib.Path) -> dict[str, float]:
    """The last accuracies and the means of GDC and SOC; also as result.json."""
    last = runs.read(out / "epochs.csv")[-1]
    steps = runs.read(out / "steps.csv")
    results = {name: last[name] for name in ("all", "old", "new")}
    results |= {name: report.mean_of(steps, name) for name in ("gdc", "soc")}
    runs.replace(out / "result.json", json.dumps(results, indent=2) + "\n")
    return results


def _method(name):
    """The transformation for stacked gradients and the factor that makes it a sum."""
    if name == "sum" or name in COORDINATED:
        return None, 1
    method = optax_mtl.get(name, num_tasks=2)
    return method, 2 if optax_mtl.METHODS[name].scale == "mean" else 1


def _sgd(lr, lr_min, epochs, steps_per_epoch, weight_decay):
    """PyTorch's SGD with momentum, and a cosine that moves once per epoch."""

    def schedule(count):
        epoch = count // steps_per_epoch
        return lr_min + (lr - lr_min) * (1 + jnp.cos(math.pi * epoch / epochs)) / 2

    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, matrices),
        optax.sgd(schedule, momentum=0.9),
    )


def _part(params):
    """Which optimizer each parameter has."""

    def part(path, _):
        first = jax.tree_util.keystr(path[:1], simple=True)
        return "backbone" if first == "backbone" else "heads"

    return jax.tree_util.tree_map_with_path(part, params)


def _without_seed(config):
    """What the compiled functions depend on."""
    run = {"seed": 0, "out": "", "resume": False, "tensorboard": False}
    return dataclasses.replace(config, **run)


def _sizes(config, split):
    preset = model.PRESETS[config.preset]
    return preset, split.images.shape[1:], jnp.dtype(config.dtype)


def _trains(config):
    """Filter of the parameters that train."""
    depth = model.PRESETS[config.preset].depth
    return lambda path, _: model.is_trainable(path, config.trainable, depth)


if __name__ == "__main__":
    run_program(main)
