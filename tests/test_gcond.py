"""GCond against its authors' values and against a walk with whole vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl import tasks
from optax_mtl.methods.conflict.gcond import (
    gcond,
    gcond_coefficients,
    scale_by_lion_lars,
)


def _two_tasks():
    t, p = np.arange(2)[:, None], np.arange(4)
    wave = lambda s: (1 + t) * np.sin(1 + p + 2.4 * t + 0.3 * s)
    return np.array([wave(s) for s in range(3)], np.float32)


def _three_tasks():
    t, p = np.arange(3)[:, None], np.arange(5)
    wave = lambda s: (1 + t / 2) * np.cos(0.7 * p + 2.1 * t + 0.4 * s)
    return np.array([wave(s) for s in range(4)], np.float32)


def _run(gradients, **options):
    """Updates and states, step by step."""
    method = gcond(gradients.shape[1], **options)
    state = method.init(jnp.zeros(gradients.shape[2:]))
    step = jax.jit(method.update)
    outs, states = [], []
    for gradient in gradients:
        out, state = step(jnp.asarray(gradient), state)
        outs.append(out)
        states.append(state)
    return np.array(outs), states


TWO_TASKS = [
    [0.913787, -0.909107, -1.896173, -1.139906],
    [-0.083545, -1.764255, -1.822917, -0.205598],
    [-1.186917, -2.254942, -1.249784, 0.904419],
]
TWO_TASKS_ZONES = [
    [0.123968, -1.762589, -2.02863, -0.429558],
    [-0.563041, -2.13534, -1.744418, 0.250315],
    [-1.513605, -1.917849, -0.558831, 1.313973],
]
TWO_TASKS_THRESHOLDS = [
    [0.705135, -1.134578, -1.931165, -0.952248],
    [-0.003505, -1.702312, -1.83602, -0.2817],
    [-0.684737, -1.995957, -1.472103, 0.405195],
]
THREE_TASKS = [
    [-0.658668, 0.618839, 1.605296, 1.836757, 1.204363],
    [-0.804242, 0.598497, 1.719753, 2.032183, 1.388845],
    [0.066671, 1.391888, 2.062478, 1.763052, 0.634436],
    [0.899534, 1.92239, 2.041115, 1.199872, -0.20569],
]
THREE_TASKS_ZONES = {
    0: [-2.481632, -1.749964, -0.195261, 1.451276, 2.415256],
    3: [-1.204736, 0.328838, 1.707755, 2.283488, 1.785261],
}
OTHER = {"thresholds": (-0.95, -0.3, 0.1), "power": 1.0}


# The authors' PyTorch class with float32 buffers, where what it keeps of two tasks is
# overwritten: the values are those of "accumulated". For "resolved" see AUTHORS below.
@pytest.mark.parametrize(
    "expected, mode",
    [
        (TWO_TASKS, {}),
        (TWO_TASKS_ZONES, {"smooth": False}),
        (TWO_TASKS_THRESHOLDS, OTHER),
    ],
)
def test_authors_values_of_two_tasks(expected, mode):
    outs, states = _run(_two_tasks(), reference="accumulated", **mode)
    np.testing.assert_allclose(outs, expected, rtol=1e-4, atol=1e-6)
    assert states[0].arbitration.winners[-1] == 1
    assert float(states[0].arbitration.cosines[0, 1]) == pytest.approx(-0.696463, 1e-5)


def test_authors_momentum_of_two_tasks():
    outs, _ = _run(_two_tasks())
    momentum = optax.ema(0.85)
    state, smooth = momentum.init(jnp.zeros(4)), []
    for out in outs:
        mean, state = momentum.update(out, state)
        smooth.append(mean)
    expected = [
        [0.374689, -1.371349, -1.856575, -0.634874],
        [-0.232349, -1.714826, -1.620699, -0.036509],
    ]
    np.testing.assert_allclose(smooth[1:], expected, rtol=1e-4, atol=1e-6)


def test_authors_values_of_three_tasks():
    outs, _ = _run(_three_tasks(), reference="resolved")
    np.testing.assert_allclose(outs, THREE_TASKS, rtol=1e-4, atol=1e-6)
    outs, _ = _run(_three_tasks(), reference="resolved", smooth=False)
    for step, expected in THREE_TASKS_ZONES.items():
        np.testing.assert_allclose(outs[step], expected, rtol=1e-4, atol=1e-6)


def _walk(gradients, reference, window, smooth, cap, weak=0.0):
    """The published rule with whole vectors in float64, one after the other."""
    num_tasks = gradients.shape[1]
    previous = np.zeros_like(gradients[0], np.float64)
    history, means = [], None
    for gradient in gradients.astype(np.float64):
        v = gradient.copy()
        norms = np.linalg.norm(v, axis=1)
        means = np.full(num_tasks, norms.mean()) if means is None else means
        means = 0.95 * means + 0.05 * norms
        v *= np.minimum(1, cap / norms)[:, None]
        for _ in range(2 * num_tasks):
            length = np.linalg.norm(v, axis=1)
            cosine = lambda a, b: a @ b / max(np.sqrt((a @ a) * (b @ b)), 1e-30)
            pairs = [
                (cosine(v[i], v[j]), i, j)
                for i in range(num_tasks)
                for j in range(i + 1, num_tasks)
                if min(length[i], length[j]) > 1e-5 * norms.min()
            ]
            c, i, j = min(pairs)
            if c >= weak - 1e-6:
                break
            strength = length[[i, j]] / means[[i, j]]
            stability = [max(0, cosine(v[m], previous[m])) for m in (i, j)]
            score = 0.8 * np.array(stability) + 0.2 * strength / strength.sum()
            w, k = (i, j) if score[0] >= score[1] else (j, i)
            if window and len(history) >= window:
                last = set(history[-window:])
                w, k = (k, w) if last == {w} else (w, k)
            if not smooth and c < -0.8:
                v[k] = 0
            else:
                if c <= -0.8:
                    angle = np.pi
                elif c < -0.5:
                    angle = np.pi / 2 * (1 + ((c + 0.5) / -0.3) ** 2)
                else:
                    angle = np.pi / 2 * (1 - np.clip((c + 0.5) / (weak + 0.5), 0, 1))
                a, b = np.sin(angle), np.sin(min(angle, np.pi / 2))
                if not smooth:
                    a, b = float(c >= -0.5), 1.0
                dot = v[w] @ v[k]
                v[w], v[k] = (
                    v[w] - a * dot / length[k] ** 2 * v[k],
                    v[k] - b * dot / length[w] ** 2 * v[w],
                )
            if smooth or c < -0.5:
                history.append(w)
        previous = gradient if reference == "accumulated" else v
        yield v.sum(0), history[-window:] if window else []


@pytest.mark.parametrize("reference", ["accumulated", "resolved"])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("window, cap", [(3, 2.0), (1, np.inf), (0, np.inf)])
def test_whole_vectors_give_the_same(reference, smooth, window, cap):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(12, 4, 6)).astype(np.float32)
    gradients += 1.5 * rng.normal(size=(4, 6))  # Every task has a stable part.
    options = {"reference": reference, "smooth": smooth, "dominance_window": window}
    outs, states = _run(
        gradients, norm_cap=cap, thresholds=(-0.8, -0.5, 0.2), **options
    )
    walk = _walk(gradients, reference, window, smooth, cap, weak=0.2)
    for out, state, (expected, winners) in zip(outs, states, walk):
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        if len(winners) == window > 0:
            np.testing.assert_array_equal(state.arbitration.winners, winners)


@pytest.mark.parametrize("one_task_each", [False, True])
def test_accumulated_over_micro_batches(one_task_each):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 2, 3)).astype(np.float32) + np.array([[[1.0], [-1.0]]])
    params = jnp.zeros(3)
    halves = lambda params, x: 0.5 * jnp.mean(jnp.sum((params - x) ** 2, -1), 0)
    losses_fn = lambda params, x: dict(zip("ab", halves(params[None, None], x)))

    # The gradient of a task on a micro-batch, k of four, is the mean of -x.
    parts = -np.stack([x[k::4].mean(0) for k in range(4)])
    mean = parts.mean(0)
    if one_task_each:
        mean = np.stack([parts[i::2, i].mean(0) for i in range(2)])
    expected, _ = next(_walk(mean[None], "accumulated", 3, True, np.inf))

    # Inside one step, and call by call.
    fn = optax_mtl.accumulate_task_grads(losses_fn, 4, one_task_each=one_task_each)
    method = gcond(2)
    update, _ = method.update(fn(params, x)[1], method.init(params))
    np.testing.assert_allclose(update, expected, rtol=1e-4)
    tx = optax_mtl.multi_steps(gcond(2), 4, 2, one_task_each=one_task_each)
    state = tx.init(params)
    for k in range(4):
        grads = jax.jacrev(halves)(params[None, None], x[k::4])[:, 0, 0]
        update, state = tx.update(grads[k % 2] if one_task_each else grads, state)
    np.testing.assert_allclose(update, expected, rtol=1e-4)
    assert optax.tree.get(state, "arbitration").iterations > 0


@pytest.mark.parametrize("window, winners", [(3, [1, 1, 1, 0, 1]), (0, [1] * 5)])
def test_a_dominating_task_loses(window, winners):
    gradients = np.array([[[1, 0], [-3, 1]]] * 5, np.float32)
    states = _run(gradients, dominance_window=window)[1]
    assert [int(s.arbitration.winners[-1]) for s in states] == winners


def test_in_a_critical_conflict_the_winner_stays_as_it_is():
    gradient = np.array([[[1.0, 0.0], [-2.0, 0.2]]], np.float32)
    out, (state,) = _run(gradient)
    resolved = state.arbitration.coefficients @ gradient[0]
    np.testing.assert_allclose(resolved[1], gradient[0, 1], rtol=1e-5)
    np.testing.assert_allclose(resolved[0] @ gradient[0, 1], 0, atol=1e-6)
    np.testing.assert_allclose(out[0], resolved.sum(0), rtol=1e-5)


def test_without_a_conflict_the_sum():
    gradient = np.array([[[1.0, 0.5], [0.5, 1.0]]], np.float32)
    out, (state,) = _run(gradient)
    np.testing.assert_allclose(out[0], [1.5, 1.5], rtol=1e-6)
    assert state.arbitration.iterations == 0
    np.testing.assert_array_equal(state.arbitration.winners, [-1, -1, -1])


def test_equal_thresholds_make_empty_zones():
    outs, _ = _run(_two_tasks(), thresholds=(-0.5, -0.5, -0.5))
    assert np.isfinite(outs).all()
    # All that is left is the critical zone: PCGrad's projection of the loser.
    loser, winner = _two_tasks()[0]
    projected = loser - loser @ winner / (winner @ winner) * winner
    np.testing.assert_allclose(outs[0], projected + winner, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_of_the_last_gradients(dtype):
    outs, states = _run(_two_tasks(), dtype=dtype)
    assert states[-1].previous.dtype == dtype
    assert outs.dtype == np.float32
    np.testing.assert_allclose(outs, TWO_TASKS, rtol=1e-4, atol=1e-6)


def test_scale_changes_nothing_but_the_length():
    gradients = _three_tasks()
    expected, _ = _run(gradients)
    for scale in (1e-12, 1e12):
        outs, _ = _run(gradients * np.float32(scale), dtype=jnp.float16)
        np.testing.assert_allclose(outs / scale, expected, rtol=1e-3, atol=1e-3)


def test_an_absent_task_takes_no_part():
    gradients = _three_tasks()
    absent = gradients.copy()
    absent[1:3, 1] = 0
    outs, states = _run(absent)
    # Its statistics wait: what the first step left is there in the fourth.
    for old, new in zip(
        jax.tree.leaves((states[0].previous[1], states[0].norms[1])),
        jax.tree.leaves((states[2].previous[1], states[2].norms[1])),
    ):
        np.testing.assert_array_equal(old, new)

    # The other two get what they get alone (from their own first step on).
    first = np.zeros_like(gradients[:, :2])
    first[:] = gradients[:, ::2]
    pair, _ = _run(first[1:3])
    alone = gradients.copy()
    alone[:, 1] = 0
    outs, _ = _run(alone[1:3])
    np.testing.assert_allclose(outs, pair, rtol=1e-5)


def test_nothing_at_all_is_zero():
    outs, states = _run(np.zeros((2, 3, 5), np.float32))
    np.testing.assert_array_equal(outs, 0)
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), states[-1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_passes_and_leaves_nothing_behind(bad):
    gradients = _three_tasks()
    gradients[1, 2, 0] = bad
    outs, states = _run(gradients)
    assert not np.isfinite(outs[1]).any()
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
    without, _ = _run(gradients[[0, 2, 3]])
    np.testing.assert_array_equal(outs[[0, 2, 3]], without)


def test_anti_parallel_gradients():
    outs, _ = _run(np.array([[[1.0, 2.0], [-2.0, -4.0]]], np.float32))
    np.testing.assert_allclose(outs[0], [-2, -4], rtol=1e-5)


def test_many_tasks_compile_to_one_loop():
    def operations(num_tasks):
        method, updates = gcond(num_tasks), jnp.ones((num_tasks, 3))
        jaxpr = jax.make_jaxpr(method.update)(updates, method.init(jnp.ones(3)))
        return str(jaxpr).count(" = ")

    assert operations(64) == operations(4)
    gradients = np.random.default_rng(0).normal(size=(1, 64, 100))
    outs, (state,) = _run(gradients.astype(np.float32))
    assert np.isfinite(outs).all() and state.arbitration.iterations > 0


def test_measured_in_blocks(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(tasks, "_MAX_IN_ONE_PIECE", 2**10)
    monkeypatch.setattr(tasks, "_BLOCK_ELEMENTS", 2**8)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(2, 3, 3001)).astype(np.float32)
    gradients += np.array([1, -1, -1], np.float32)[:, None]
    outs, _ = _run(gradients)
    expected = list(_walk(gradients, "accumulated", 3, True, np.inf))
    np.testing.assert_allclose(outs[1], expected[1][0], rtol=1e-3, atol=1e-3)


def test_trees_and_jit_without_retracing():
    gradients = _three_tasks()
    tree = {"a": gradients[..., :2], "b": {"c": gradients[..., 2:].reshape(4, 3, 3, 1)}}
    method = gcond(3)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), tree)
    state = method.init(params)
    count = 0

    @jax.jit
    def step(updates, state, params):
        nonlocal count
        count += 1
        return method.update(updates, state, params, losses=jnp.ones(3))

    for s in range(4):
        out, state = step(jax.tree.map(lambda x, s=s: x[s], tree), state, params)
    assert count == 1
    flat = np.concatenate([out["a"], out["b"]["c"][:, 0]])
    np.testing.assert_allclose(flat, _run(gradients)[0][-1], rtol=1e-5)


@pytest.mark.parametrize(
    "thresholds", [(-0.5, -0.8, 0.0), (-0.8, 0.1, 0.0), (-1.1, -0.5, 0.0), (0, 0, 2)]
)
def test_thresholds_out_of_order(thresholds):
    with pytest.raises(ValueError, match="critical <= main <= weak"):
        gcond(2, thresholds=thresholds)


def test_an_unknown_reference():
    with pytest.raises(ValueError, match="accumulated"):
        gcond(2, reference="raw")


def test_another_number_of_tasks():
    method = gcond(3)
    with pytest.raises(ValueError, match="num_tasks=3"):
        method.update(jnp.ones((2, 4)), method.init(jnp.ones(4)))


def test_coefficients_limit():
    cosines = jnp.array([[1.0, -0.9], [-0.9, 1.0]])
    winners = jnp.full(3, -1)
    args = (cosines, jnp.zeros((2, 2)), jnp.ones(2), winners)
    coefficients, winners, iterations = gcond_coefficients(*args, max_iters=0)
    np.testing.assert_array_equal(coefficients, np.eye(2))
    assert iterations == 0


def test_lion_lars():
    tx = scale_by_lion_lars(clip=2.0)
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(2), "c": jnp.zeros(2)}
    updates = {"a": jnp.array([-5.0, 0.0]), "b": jnp.full(2, 1e-6), "c": jnp.ones(2)}
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out["a"], [-1, 0], rtol=1e-6)  # |p| = |m|.
    np.testing.assert_allclose(out["b"], [2, 2], rtol=1e-6)  # Clipped.
    np.testing.assert_allclose(out["c"], [1, 1], rtol=1e-6)  # Ratio 1 for |p| = 0.


# The authors' code with float64 buffers, which are copied as its own bfloat16 ones are,
# and with the weak threshold lowered by 1e-5: at exact orthogonality rounding alone
# decides there whether another win counts. By the number of tasks, then the mode.
AUTHORS = {
    2: {
        "defaults": [
            [0.913787, -0.909107, -1.896173, -1.139906],
            [0.990438, -0.610495, -1.650141, -1.172655],
            [0.939517, -0.652721, -1.644851, -1.124712],
        ],
        "zones": [
            [0.123968, -1.762589, -2.02863, -0.429558],
            [-0.563041, -2.13534, -1.744418, 0.250315],
            [-1.513605, -1.917849, -0.558831, 1.313973],
        ],
        "thresholds": [
            [0.705135, -1.134578, -1.931165, -0.952248],
            [0.960864, -0.666307, -1.680879, -1.150058],
            [0.707046, -0.94728, -1.730681, -0.922902],
        ],
    },
    3: {
        "defaults": [
            [-0.658668, 0.618839, 1.605296, 1.836757, 1.204363],
            [-0.804242, 0.598497, 1.719753, 2.032183, 1.388845],
            [0.066671, 1.391888, 2.062478, 1.763052, 0.634436],
            [0.899534, 1.92239, 2.041115, 1.199872, -0.20569],
        ],
        "zones": [
            [-2.481632, -1.749964, -0.195261, 1.451276, 2.415256],
            [-2.159221, -0.834518, 0.882672, 2.184727, 2.459271],
            [-1.519478, 0.196715, 1.820391, 2.587908, 2.138292],
            [-1.204736, 0.328838, 1.707755, 2.283488, 1.785261],
        ],
        "thresholds": [
            [-0.96162, -0.02518, 0.923103, 1.437236, 1.275415],
            [-1.022797, 0.080652, 1.146169, 1.672625, 1.412418],
            [-0.01261, 1.026629, 1.583029, 1.394906, 0.550737],
            [0.476774, 1.465772, 1.765395, 1.234725, 0.123345],
        ],
    },
}
MODES = {"defaults": {}, "zones": {"smooth": False}, "thresholds": OTHER}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tasks", AUTHORS)
def test_resolved_is_the_authors_code(num_tasks, mode):
    gradients = _two_tasks() if num_tasks == 2 else _three_tasks()
    method = gcond(num_tasks, reference="resolved", **MODES[mode])
    run = jax.jit(
        lambda s: jax.lax.scan(lambda s, g: method.update(g, s)[::-1], s, gradients)[1]
    )
    ours = method.init(jnp.zeros(gradients.shape[2:]))
    theirs = ours._replace(norms=jnp.ones(num_tasks))  # Running norms from 1.
    for state in (ours, theirs):
        np.testing.assert_allclose(
            run(state), AUTHORS[num_tasks][mode], rtol=2e-6, atol=2e-6
        )
