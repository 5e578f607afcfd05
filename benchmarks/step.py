"""Whole training steps against TorchJD: forward, backward, UPGrad, AdamW.

    python -m benchmarks.step                      # extra: bench; some minutes
    python -m benchmarks.step --models mlp --tasks 4 16
    python -m benchmarks.step --clock cpu          # On a machine shared with others

The same trunk with one small head a task, here by ``value_and_grad`` as it is by
default, and in PyTorch by TorchJD's ``mtl_backward`` and ``jac_to_grad``. In the last
rows each example of a batch is an objective, here by ``own_data=True``, there by the
engine of ``torchjd.autogram``. Both frameworks take turns in one process; each step is
also given as a multiple of its own framework's plain sum.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_mtl

OUTPUTS = 8  # Of each head.
WIDTH, DEPTH, BATCH = 512, 6, 256  # Of the MLP.
CHANNELS, SIDE, IMAGES = (32, 64, 128), 16, 32  # Of the ConvNet.
EXAMPLES = 64  # Objectives in the last rows.
RATE = 1e-3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def draw_params(model, num_tasks):
    """Arrays of the trunk, and of a head for each task."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5
    if model == "mlp":
        trunk = [draw(WIDTH, WIDTH) for _ in range(DEPTH)]
    else:
        sizes = [(a, b) for b in CHANNELS for a in (b // 2 if b > 32 else 3, b)]
        trunk = [draw(3, 3, a, b) for a, b in sizes]
    heads = [draw(trunk[-1].shape[-1], OUTPUTS) for _ in range(num_tasks)]
    cast = lambda arrays: [np.asarray(x, np.float32) for x in arrays]
    return {"trunk": cast(trunk), "heads": cast(heads)}


def draw_batch(model, num_tasks, size=None):
    """Inputs, and the targets of each task."""
    rng = np.random.default_rng(1)
    if model == "mlp":
        inputs = rng.normal(size=(size or BATCH, WIDTH))
    else:
        inputs = rng.normal(size=(size or IMAGES, SIDE, SIDE, 3))
    targets = rng.normal(size=(num_tasks, len(inputs), OUTPUTS))
    return np.asarray(inputs, np.float32), np.asarray(targets, np.float32)


def trunk_fn(trunk, x):
    for i, w in enumerate(trunk):
        if w.ndim == 2:
            x = jax.nn.relu(x @ w)
        else:
            stride = (1 + i % 2,) * 2
            dims = ("NHWC", "HWIO", "NHWC")
            same = [(1, 1), (1, 1)]
            x = jax.lax.conv_general_dilated(x, w, stride, same, dimension_numbers=dims)
            x = jax.nn.relu(x)
    return x.mean((1, 2)) if x.ndim == 4 else x


def our_example_steps(params, inputs, targets):
    """The same with one head and an objective for each example."""

    def loss_fn(params, inputs, targets):
        z = trunk_fn(params["trunk"], inputs[None])
        return jnp.mean((z @ params["heads"][0] - targets) ** 2)

    def plain(params, state, inputs, targets):
        losses_fn = jax.vmap(loss_fn, (None, 0, 0))
        sum_fn = lambda params: losses_fn(params, inputs, targets).sum()
        loss, grads = jax.value_and_grad(sum_fn)(params)
        return loss, grads, state

    resolve = optax_mtl.value_and_grad(loss_fn, optax_mtl.upgrad(), own_data=True)
    batch = jnp.asarray(inputs), jnp.asarray(targets[0])
    return {
        "plain": our_step(plain, (), params, batch),
        "upgrad": our_step(resolve, resolve.init(params), params, batch),
    }


def our_steps(params, inputs, targets):
    """A step of the plain sum and one of UPGrad, of named losses."""

    def losses_fn(params, inputs, targets):
        z = trunk_fn(params["trunk"], inputs)
        pairs = enumerate(zip(params["heads"], targets, strict=True))
        return {f"{i:02}": jnp.mean((z @ w - y) ** 2) for i, (w, y) in pairs}

    sum_fn = lambda *args: sum(losses_fn(*args).values())
    shared = {"trunk": True, "heads": False}
    resolve = optax_mtl.value_and_grad(losses_fn, optax_mtl.upgrad(), shared=shared)

    def plain(params, state, *batch):
        loss, grads = jax.value_and_grad(sum_fn)(params, *batch)
        return loss, grads, state

    batch = jnp.asarray(inputs), jnp.asarray(targets)
    return {
        "plain": our_step(plain, (), params, batch),
        "upgrad": our_step(resolve, resolve.init(params), params, batch),
    }


def our_step(fn, state, params, batch):
    """A training step that keeps what it has learned, and its time to compile."""
    tx = optax.adamw(RATE)
    params = jax.tree.map(jnp.asarray, params)

    def step(carry, *batch):
        params, state, tx_state = carry
        losses, grads, state = fn(params, state, *batch)
        updates, tx_state = tx.update(grads, tx_state, params)
        return (optax.apply_updates(params, updates), state, tx_state), losses

    carry = params, state, tx.init(params)
    compiled = jax.jit(step, donate_argnums=0).lower(carry, *batch).compile()

    def run():
        nonlocal carry
        carry, losses = compiled(carry, *batch)
        return jax.block_until_ready((carry, losses))[1]

    return run


def peer_steps(params, inputs, targets):
    """The same in PyTorch, UPGrad by TorchJD."""
    import torch
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    def make(resolved):
        trunk, heads, features = peer_model(params)
        optimizer = torch.optim.AdamW([*trunk, *heads], RATE, weight_decay=1e-4)
        aggregator = UPGrad()
        x, y = peer_inputs(inputs), torch.from_numpy(targets)

        def run():
            optimizer.zero_grad()
            z = features(x)
            losses = [((z @ w - t) ** 2).mean() for w, t in zip(heads, y, strict=True)]
            if resolved:
                mtl_backward(losses, z)
                jac_to_grad(trunk, aggregator)
            else:
                sum(losses).backward()
            optimizer.step()
            return [float(loss.detach()) for loss in losses]

        return run

    return {"plain": make(False), "upgrad": make(True)}


def peer_example_steps(params, inputs, targets):
    """The same in PyTorch, the Gram matrix by the engine of TorchJD."""
    import torch
    from torchjd.aggregation import UPGradWeighting
    from torchjd.autogram import Engine

    def make(resolved):
        model = torch.nn.Sequential(*peer_layers(params))
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4)
        engine, weighting = Engine(model, batch_dim=0), UPGradWeighting()
        x, y = peer_inputs(inputs), torch.from_numpy(targets[0])

        def run():
            optimizer.zero_grad()
            losses = ((model(x) - y) ** 2).mean(1)
            if resolved:
                losses.backward(weighting(engine.compute_gramian(losses)))
            else:
                losses.sum().backward()
            optimizer.step()
            return losses.tolist()

        return run

    return {"plain": make(False), "upgrad": make(True)}


def peer_layers(params):
    """Trunk and first head as modules."""
    import torch

    def with_weight(layer, weight):
        layer.weight.data = torch.from_numpy(weight.copy())
        return layer

    linear = lambda w: with_weight(torch.nn.Linear(*w.shape, bias=False), w.T)
    for i, w in enumerate(params["trunk"]):
        if w.ndim == 2:
            yield linear(w)
        else:
            shape = w.shape[2], w.shape[3], 3, 1 + i % 2, 1
            layer = torch.nn.Conv2d(*shape, bias=False)
            yield with_weight(layer, w.transpose(3, 2, 0, 1))
        yield torch.nn.ReLU()
    if params["trunk"][0].ndim == 4:
        yield torch.nn.AdaptiveAvgPool2d(1)
        yield torch.nn.Flatten()
    yield linear(params["heads"][0])


def peer_model(params):
    """Parameters of trunk and heads, and the function of the trunk."""
    import torch
    from torch.nn import functional

    as_parameter = lambda x: torch.nn.Parameter(torch.from_numpy(x.copy()))
    trunk = [
        as_parameter(w if w.ndim == 2 else w.transpose(3, 2, 0, 1))
        for w in params["trunk"]
    ]
    heads = [as_parameter(w) for w in params["heads"]]

    def features(x):
        for i, w in enumerate(trunk):
            if w.ndim == 2:
                x = torch.relu(x @ w)
            else:
                x = torch.relu(functional.conv2d(x, w, stride=1 + i % 2, padding=1))
        return x.mean((2, 3)) if x.ndim == 4 else x

    return trunk, heads, features


def peer_inputs(inputs):
    import torch

    x = torch.from_numpy(inputs)
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def shortest(calls, rounds, clock):
    """Shortest time of each call in milliseconds, all by turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):  # The first is not counted.
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
    return {name: min(values[1:]) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mlp", "convnet"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    print("| model | T | ours, ms | x plain sum | TorchJD, ms | x plain sum | ratio |")
    print("|---|---|---|---|---|---|---|")
    for model in args.models:
        for num_tasks in args.tasks:
            problem = draw_params(model, num_tasks), *draw_batch(model, num_tasks)
            sides = {"ours": our_steps(*problem), "theirs": peer_steps(*problem)}
            check_same(sides)
            print_row(model, num_tasks, sides, args)
    for model in args.models:
        problem = draw_params(model, 1), *draw_batch(model, 1, EXAMPLES)
        sides = {
            "ours": our_example_steps(*problem),
            "theirs": peer_example_steps(*problem),
        }
        check_same(sides)
        print_row(f"{model}, examples", EXAMPLES, sides, args)


def check_same(sides):
    """Both frameworks train the same: their losses agree in the second step."""
    for name in ("plain", "upgrad"):
        totals = []
        for side in sides.values():
            side[name]()
            totals.append(sum(np.sum(x) for x in jax.tree.leaves(side[name]())))
        # TorchJD regularizes its Gram matrix by 1e-4.
        np.testing.assert_allclose(*totals, rtol=1e-2)


def print_row(model, num_tasks, sides, args):
    calls = {
        (s, name): call for s, side in sides.items() for name, call in side.items()
    }
    times = shortest(calls, args.rounds, CLOCKS[args.clock])
    cells = [model, num_tasks]
    for side in sides:
        total, plain = times[side, "upgrad"], times[side, "plain"]
        cells += [f"{total:.1f}", f"{total / plain:.2f}"]
    cells.append(f"{times['ours', 'upgrad'] / times['theirs', 'upgrad']:.2f}")
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
