"""What grows with the number of leaves: programs in proportion, and no faster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mtl
from optax_mtl import tasks

# Whatever goes through the leaves by itself; the others share base.from_state.
READERS = [n for n, row in optax_mtl.METHODS.items() if "gradients" in row.reads]


def instructions(name, leaves, num_tasks=2):
    """Instructions of the compiled update, those within fusions included."""
    method = optax_mtl.get(name, num_tasks)
    shaped = lambda *shape: [jax.ShapeDtypeStruct(shape, jnp.float32)] * leaves
    params, losses = shaped(2), jnp.ones(num_tasks)
    state = jax.eval_shape(method.init, params)
    step = lambda u, s, p: method.update(u, s, p, losses=losses)
    compiled = jax.jit(step).lower(shaped(num_tasks, 2), state, params).compile()
    return compiled.as_text().count(" = ")


@pytest.mark.parametrize("name", [*READERS, "mgda"])
def test_programs_grow_in_proportion_to_the_leaves(name):
    # A scalar of all leaves that XLA writes into the expression of each makes the
    # second difference two fifths larger than in proportion.
    few, some, many = (instructions(name, leaves) for leaves in (4, 8, 16))
    assert many - some < 1.15 * 2 * (some - few)


def test_sums_over_the_leaves_are_those_of_numpy():
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (3,), (2, 3)]:
        parts = [rng.normal(size=shape).astype(np.float32) for _ in range(5)]
        found = jax.jit(lambda *parts: tasks.sum_leaves(parts))(*parts)
        np.testing.assert_allclose(found, np.sum(parts, axis=0), rtol=1e-5, atol=1e-6)
    apart = tasks.sum_leaves([np.float32([1, np.nan, 1]), np.float32([np.inf, 0, 2])])
    np.testing.assert_array_equal(apart, [np.inf, np.nan, 3])


def test_sharded_parameters_are_not_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    params = [put(np.zeros((16, 3)), "data"), put(np.zeros((2, 8)), None, "data")]
    updates = [
        put(np.ones((2, 16, 3)), None, "data"),
        put(np.ones((2, 2, 8)), None, None, "data"),
    ]
    methods = {name: optax_mtl.get(name, 2) for name in READERS}
    states = {name: method.init(params) for name, method in methods.items()}

    def step(updates, states):
        update = lambda name: methods[name].update(
            updates, states[name], losses=jnp.ones(2)
        )
        return {name: update(name) for name in methods}

    text = jax.jit(step).lower(updates, states).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
