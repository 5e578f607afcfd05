"""Parameters sharded over devices: every state lies as they do, from init on."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl

T = 3
# No other array has these shapes behind a task axis.
SPECS = {"rows": P("data", None), "columns": P(None, "data"), "whole": P(None)}
SHAPES = {"rows": (16, 3), "columns": (2, 8), "whole": (5,)}


def _adam():
    return optax.chain(optax_mtl.upgrad(), optax.adam(0.1))


WRAPPED = {
    "per_task": lambda: optax_mtl.per_task(
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()), T
    ),
    "per_group": lambda: optax_mtl.per_group(optax_mtl.modo(T), lambda path: path),
    "reweigh": lambda: optax.chain(
        optax_mtl.reweigh(optax_mtl.modo(T)), optax_mtl.mgda()
    ),
    "fix_weights": lambda: optax_mtl.fix_weights(
        optax_mtl.modo(T), [None] * (T - 1) + [0.1]
    ),
    "record_conflicts": lambda: optax.chain(optax_mtl.record_conflicts(T), _adam()),
    "recorded_method": lambda: optax_mtl.record_conflicts(
        T, optax_mtl.modo(T), every=2
    ),
    "smooth_weights": lambda: optax_mtl.smooth_weights(optax_mtl.mgda(), T),
    "update_every": lambda: optax_mtl.update_every(optax_mtl.mgda(), 2, T),
    "scale_by_agreement": lambda: optax_mtl.scale_by_agreement(_adam()),
    "apply_if_finite": lambda: optax_mtl.apply_if_finite(_adam(), 2),
    "zero_nonfinite": lambda: optax.chain(optax_mtl.zero_nonfinite(), _adam()),
    "multi_steps": lambda: optax_mtl.multi_steps(_adam(), 2, T),
    "gcond_resolved": lambda: optax_mtl.gcond(T, reference="resolved"),
    "bloop_gradient": lambda: optax_mtl.bloop(subtract="gradient", barrier=True),
    "moco_loss": lambda: optax_mtl.moco(T, normalize="loss"),
    "energy_gate_channel": lambda: optax_mtl.energy_gate(T, granularity="channel"),
    "energy_gate_tensor": lambda: optax_mtl.energy_gate(T, granularity="tensor"),
}


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {name: draw(*shape) for name, shape in SHAPES.items()}
    updates = [{k: draw(T, *s) for k, s in SHAPES.items()} for _ in range(2)]
    return params, updates


# Compiled together: many small programs take longer than a few large ones.
GROUPS = {
    family: [n for n, row in optax_mtl.METHODS.items() if row.family == family]
    for family in sorted({row.family for row in optax_mtl.METHODS.values()})
} | {"wrapped": list(WRAPPED)}


def make(group):
    """All methods of a group as one transformation, to dicts by name."""
    make_one = lambda n: WRAPPED[n]() if n in WRAPPED else optax_mtl.get(n, T)
    each = {name: make_one(name) for name in GROUPS[group]}

    def init(params):
        return {name: tx.init(params) for name, tx in each.items()}

    def update(updates, state, params):
        losses = np.linspace(0.5, 2, T, dtype=np.float32)
        one = lambda n, tx: tx.update(updates, state[n], params, losses=losses)
        both = {name: one(name, tx) for name, tx in each.items()}
        return {n: x for n, (x, _) in both.items()}, {
            n: s for n, (_, s) in both.items()
        }

    return init, jax.jit(update)


def run(step, state, params, updates):
    out = []
    for batch in updates:
        update, state = step(batch, state, params)
        out.append(update)
    return out, state


@functools.cache
def on_one_device(group):
    params, updates = inputs()
    init, step = make(group)
    out, _ = run(step, jax.jit(init)(params), params, updates)
    return jax.device_get(out)


def assert_laid_out(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        for name, shape in SHAPES.items():
            if x.ndim >= len(shape) and x.shape[x.ndim - len(shape) :] == shape:
                spec = P(*[None] * (x.ndim - len(shape)), *SPECS[name])
                expected = NamedSharding(x.sharding.mesh, spec)
                assert x.sharding.is_equivalent_to(expected, x.ndim), (path, x.sharding)


def own_states(state):
    """The parts of a state that are named tuples of this library."""
    own = lambda s: hasattr(s, "_fields") and type(s).__module__.startswith("optax_mtl")
    parts = [s for s in jax.tree.leaves(state, is_leaf=own) if own(s)]
    inner = [own_states(x) for part in parts for x in part if hasattr(x, "_fields")]
    chains = lambda x: isinstance(x, tuple)  # Of Optax, or of this library within.
    return [[x for x in part if not chains(x)] for part in parts] + inner


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_states_lie_as_the_parameters(group, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def put(tree):
        shardings = lambda k, x: NamedSharding(
            mesh, P(*[None] * (x.ndim - len(SHAPES[k])), *SPECS[k])
        )
        return {k: jax.device_put(x, shardings(k, x)) for k, x in tree.items()}

    init, step = make(group)
    params, updates = inputs()
    with jax.set_mesh(mesh):
        params, updates = put(params), [put(batch) for batch in updates]
        state = init(params)
        assert_laid_out(state)
        # Zeros that Optax makes itself are whole under jit with automatic axes.
        assert_laid_out(own_states(jax.jit(init)(params)))
        out, state = run(step, state, params, updates)
        assert_laid_out(state)
        assert_laid_out(out)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(out), on_one_device(group))
