"""SAM-GS against the authors' code, and on their toy problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from benchmarks import toy
from optax_mtl.methods.balance.sam_gs import magnitude_similarity


def gradients(scales, step):
    """Input of the golden values: g[k, i] = s_k sin(1 + i + 3 k + t / 2)."""
    task, i = np.mgrid[: len(scales), :3]
    return jnp.array(np.array(scales)[:, None] * np.sin(1 + i + 3 * task + step / 2))


# Outputs of the authors' aggregator in float64, before the factor T and the clip, at
# steps 0, 1 and 2; its similarities; its moving average of the dissimilarity.
GOLDEN = {
    "momentum": (
        (1, 1),
        {},
        [
            [135.31303748, -92.70685351, -58.15370985],
            [67.89706182, -136.14717009, -37.18759434],
            [-32.50181157, -100.59453854, -116.22600954],
        ],
        [0.99998762, 0.99996904, 0.99999414],
        None,
    ),
    "equalise": (
        (1, 20),
        {"gamma": 0.5},
        [
            [0.93286769, -0.47334876, -1.44437055],
            [0.29225911, -1.07417465, -1.45301719],
            [-0.48825705, -1.44678515, -1.07514566],
        ],
        [0.09925801, 0.09897267, 0.09941137],
        [0.0081133713, 0.0161507500, 0.0240998513],
    ),
    "three tasks": (
        (1, 2, 4),
        {"b2": 0.9, "gamma": 0.9},
        [
            [1.73739547, 2.19842441, 0.63823209],
            [2.24417480, 1.61530759, -0.49866597],
            [2.19329807, 0.63655187, -1.50543719],
        ],
        [0.68777117, 0.68553973, 0.68757821],
        None,
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("x64, rtol", [(True, 1e-6), (False, 1e-4)])
def test_equals_the_authors_code(case, x64, rtol):
    scales, options, outputs, similarities, averages = GOLDEN[case]
    with jax.enable_x64(x64):
        method = optax_mtl.sam_gs(len(scales), **options)
        update_fn, state = jax.jit(method.update), method.init(jnp.zeros(3))
        for step, expected in enumerate(outputs):
            updates = gradients(scales, step)
            psi, _ = magnitude_similarity(jnp.linalg.norm(updates, axis=1))
            np.testing.assert_allclose(psi, similarities[step], rtol=1e-6)
            update, state = update_fn(updates, state)
            np.testing.assert_allclose(update, expected, rtol=rtol)
            if averages:
                np.testing.assert_allclose(
                    state.dissimilarity, averages[step], rtol=rtol
                )


def test_similarity_of_the_paper_counts_each_task_with_itself():
    # Golden values of the specification.
    values = {(1, 1): 0.99999381, (1, 20): 0.54962901, (1, 1e6): 0.50000100}
    for scales, expected in values.items():
        norms = jnp.linalg.norm(gradients(scales, 0), axis=1)
        psi, _ = magnitude_similarity(norms, itself=True)
        np.testing.assert_allclose(psi, expected, rtol=1e-6)


def test_smallest_similarity_decides_if_asked_to():
    updates = jnp.array([[1.0, 0], [0, 1], [0.1, 0]])
    psi, smallest = magnitude_similarity(jnp.linalg.norm(updates, axis=1))
    np.testing.assert_allclose(smallest, 0.2 / 1.01, rtol=1e-6)
    np.testing.assert_allclose(psi, (1 + 2 * 0.2 / 1.01) / 3, rtol=1e-6)
    method = optax_mtl.sam_gs(3, gamma=0.3, similarity="min")
    update, state = method.update(updates, method.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, [1.4, 0.7], rtol=1e-6)  # 0.7 is the mean norm.
    # The moving average is still of the mean.
    np.testing.assert_allclose(
        state.dissimilarity, 0.01 * (1 - psi) ** 2 + 1e-8, rtol=1e-5
    )
    with pytest.raises(ValueError, match="'pairs', 'paper' or 'min'"):
        optax_mtl.sam_gs(3, similarity="mean")


def test_absent_task_takes_no_part_and_keeps_its_momentum():
    full, pair = optax_mtl.sam_gs(3), optax_mtl.sam_gs(2)
    update_full, update_pair = jax.jit(full.update), jax.jit(pair.update)
    state, pair_state = full.init(jnp.zeros(3)), pair.init(jnp.zeros(3))
    rows = np.array([0, 2])
    for step in range(3):
        updates = gradients((1, 2, 3), step).at[1].set(0)
        expected, pair_state = update_pair(updates[rows], pair_state)
        actual, state = update_full(updates, state)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert state.counts.tolist() == [3, 0, 3]
    assert not np.any(state.momentum[1])

    _, after = update_full(jnp.zeros((3, 3)), state)
    for old, new in zip(state, after):
        np.testing.assert_array_equal(old, new)


def test_reaches_the_optimum_of_the_toy_problem_from_all_seven_starts():
    tx = optax.chain(
        optax_mtl.sam_gs(2, scale_by_num_tasks=True),
        optax.clip_by_global_norm(1.0),
        optax.adam(1e-3),
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.jacrev(toy.toy_losses)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    @jax.vmap
    def descend(start):
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=26_000)
        return toy.toy_losses(params).sum()

    sums = descend(jnp.array(toy.STARTS, jnp.float32))
    assert np.all(sums < -30.1), sums  # The best is -30.18.
