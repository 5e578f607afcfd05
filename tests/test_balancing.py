"""Balancing and stochastic methods against golden values, NumPy and known laws.

Golden values without another source are from a NumPy replication of the papers and of
the authors' code (the J3 matrix and the losses below), to the digits given.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import optax_mtl
from optax_mtl import weights
from optax_mtl.methods.balance.gradnorm import gradnorm_gradient
from optax_mtl.methods.conflict.sdmgrad import sdmgrad_weights
from optax_mtl.methods.loss import famo as famo_module
from tests.common import compiled_fast

J3 = jnp.array([[3.0, 1, 0, 1], [-2, 1, 1, 0], [1, -1, 2, 0.5]])
LOSSES = jnp.array([2.0, 0.5, 1.0])


def scan(method):
    """The updates for several batches, `(steps, T, P)`, and the states after each."""

    def step(state, batch):
        update, state = method.update(batch[0], state, losses=batch[1])
        return state, (update, state)

    def all_steps(batches, losses):
        start = method.init(jnp.zeros(batches.shape[2]))
        return jax.lax.scan(step, start, (batches, losses))[1]

    go = compiled_fast(all_steps)
    return lambda batches, losses: go(jnp.asarray(batches), jnp.asarray(losses))


def run(method, batches, losses=None):
    """The updates for several batches, `(steps, T, P)`, and the last state."""
    if losses is None:
        losses = jnp.ones(batches.shape[:2])
    updates, states = scan(method)(batches, losses)
    return np.asarray(updates), jax.tree.map(lambda x: x[-1], states)


def random_batches(steps, num_tasks, size=4, seed=0):
    rng = np.random.default_rng(seed)
    batches = rng.normal(size=(steps, num_tasks, size))
    return batches.astype(np.float32), np.float32(
        rng.uniform(0.5, 2, (steps, num_tasks))
    )


def make(name, num_tasks, **options):
    return optax_mtl.get(name, num_tasks, **options)


LOSSES_ALONE = [n for n, row in optax_mtl.METHODS.items() if row.reads == {"losses"}]


@pytest.mark.parametrize("name", LOSSES_ALONE)
def test_losses_alone_give_weights_for_one_backward_pass(name):
    method = make(name, 3)

    def refuse():
        raise AssertionError("the Gram matrix is not needed")

    state = method.init(None)
    view = optax_mtl.GramView(3, refuse)
    found, _ = method.update(view, state, losses=LOSSES)
    expected, _ = method.update(jnp.eye(3), state, losses=LOSSES)
    np.testing.assert_allclose(found, expected)


def test_gradnorm_gradient():
    # Losses at first (4, 1, 1), alpha 1.5: the slow third task is to grow.
    rates = LOSSES / jnp.array([4.0, 1, 1])
    gradient = gradnorm_gradient(jnp.ones(3), jnp.linalg.norm(J3, axis=1), rates, 1.5)
    np.testing.assert_allclose(gradient, [3.316625, 2.449490, -2.5], rtol=1e-6)


@pytest.mark.parametrize("initial_losses", [None, (1.0, 2.0, 3.0)])
def test_gradnorm_like_numpy(initial_losses):
    batches, losses = random_batches(6, 3)
    options = {"alpha": 0.5, "initial_losses": initial_losses}
    method = make("gradnorm", 3, optimizer=optax.sgd(0.1), **options)
    updates, state = run(method, batches, losses)
    w = np.ones(3)
    for g, loss, update in zip(batches, losses, updates):
        np.testing.assert_allclose(update, w @ g, rtol=1e-5, atol=1e-5)
        first = losses[0] if initial_losses is None else initial_losses
        norms, rates = np.linalg.norm(g, axis=1), loss / first
        targets = np.mean(w * norms) * (rates / rates.mean()) ** 0.5
        w = np.maximum(w - 0.1 * np.sign(w * norms - targets) * norms, 1e-3)
        w = 3 * w / w.sum()
    np.testing.assert_allclose(state.weights, w, rtol=1e-5)


def test_gradnorm_equalises_norms():
    batches = np.tile(np.diag([4.0, 1.0, 0.5]), (400, 1, 1))
    updates, _ = run(make("gradnorm", 3, optimizer=optax.adam(0.01)), batches)
    np.testing.assert_allclose(updates[-1] / updates[-1].mean(), 1, atol=0.1)


def test_db_mtl_like_numpy():
    batches, losses = random_batches(5, 3)
    batches[2, 1] = 0  # Absent: the average of the task stays as it was.
    method = make("db_mtl", 3, beta=0.8, sigma=0.5)
    updates, state = run(method, batches, losses)
    average, count = np.zeros((3, 4)), np.zeros(3)
    for g, loss, update in zip(batches, losses, updates):
        exists = np.any(g, axis=1)
        count += exists
        decay = (0.8 / np.maximum(count, 1) ** 0.5)[:, None]
        new = decay * average + (1 - decay) * g / loss[:, None]
        average = np.where(exists[:, None], new, average)
        norms = np.linalg.norm(average[exists], axis=1)
        expected = norms.max() / norms @ average[exists]
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.averages, average, rtol=1e-5)


def test_db_mtl_identical_gradients():
    # T g / L for equal losses L (table of identical gradients in the survey of laws).
    updates = jnp.tile(jnp.array([1.0, -2.0]), (4, 1))
    method = make("db_mtl", 4, beta=0.0)
    update, _ = method.update(updates, method.init(None), losses=jnp.full(4, 0.5))
    np.testing.assert_allclose(update, [8, -16], rtol=1e-6)


def test_imtl_l_is_uncertainty_weighting_twice():
    _, losses = random_batches(20, 3)
    eye = np.tile(np.eye(3, dtype=np.float32), (20, 1, 1))
    imtl_l = make("imtl_l", 3, optimizer=optax.sgd(0.1))
    uncertainty = make("uncertainty_weighting", 3, optimizer=optax.sgd(0.2))
    expected, _ = run(uncertainty, eye, losses)
    found, _ = run(imtl_l, eye, losses)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-5)


def test_imtl_has_the_direction_of_imtl_g():
    batches, losses = random_batches(5, 3)
    updates, _ = run(make("imtl", 3), batches, losses)
    for g, update in zip(batches, updates):
        unit = g / np.linalg.norm(g, axis=1, keepdims=True)
        projections = unit @ update
        np.testing.assert_allclose(projections, projections[0], rtol=1e-3)
    expected, _ = run(make("imtl_g", 3), batches[:1])
    np.testing.assert_allclose(updates[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize(
    "name, options, power",
    [("stch", {"mu": 0.5}, lambda x: x**2), ("igb", {}, np.exp)],
)
def test_reference_losses_are_measured(name, options, power):
    _, losses = random_batches(8, 3)
    eye = np.tile(np.eye(3, dtype=np.float32), (8, 1, 1))
    updates, _ = run(make(name, 3, warmup_steps=2, window=4, **options), eye, losses)
    np.testing.assert_allclose(updates[:6], 1 / losses[:6], rtol=1e-6)
    ratios = power(losses / losses[2:6].mean(axis=0))
    expected = 3 * ratios / ratios.sum(axis=1, keepdims=True) / losses
    np.testing.assert_allclose(updates[6:], expected[6:], rtol=1e-5)


IDEAL, PREFERENCE = jnp.array([0.3, 0.2, 0.5]), jnp.array([0.2, 0.5, 0.3])


def cosine_with_preference(x):
    norm = jnp.linalg.norm
    return PREFERENCE @ x / norm(PREFERENCE) / norm(x)


def distances_from_ray(x):
    ray = PREFERENCE / jnp.linalg.norm(PREFERENCE)
    along = (x - IDEAL) @ ray
    return along, jnp.linalg.norm(x - IDEAL - along * ray)


OBJECTIVES = {
    "stch log": (
        optax_mtl.stch(3, 0.7, reference=IDEAL),
        lambda x: 3 * 0.7 * jax.nn.logsumexp(jnp.log(x / IDEAL) / 0.7),
    ),
    "stch linear": (
        optax_mtl.stch(
            3, 0.7, objective="linear", reference=IDEAL, preference=PREFERENCE
        ),
        lambda x: 0.7 * jax.nn.logsumexp(PREFERENCE * (x - IDEAL) / 0.7),
    ),
    "cosmos": (
        optax_mtl.cosmos(3.0, preference=PREFERENCE),
        lambda x: PREFERENCE @ x - 3 * cosine_with_preference(x),
    ),
    "pbi": (
        optax_mtl.pbi(preference=PREFERENCE, reference=IDEAL),
        lambda x: jnp.dot(jnp.array([1, 5.0]), jnp.array(distances_from_ray(x))),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_are_the_gradient_of_the_objective(name):
    method, objective = OBJECTIVES[name]
    found, _ = method.update(jnp.eye(3), method.init(None), losses=LOSSES)
    np.testing.assert_allclose(found, jax.grad(objective)(LOSSES), rtol=1e-5)


def test_pbi_on_the_ray_has_no_penalty():
    method = optax_mtl.pbi(preference=PREFERENCE)
    found, _ = method.update(jnp.eye(3), method.init(None), losses=7 * PREFERENCE)
    expected = PREFERENCE / jnp.linalg.norm(PREFERENCE)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_stch_refuses():
    with pytest.raises(
        ValueError, match="objective is 'sum'; it should be 'log' or 'linear'"
    ):
        optax_mtl.stch(2, objective="sum")
    with pytest.raises(ValueError, match="objective='linear'"):
        optax_mtl.stch(2, preference=jnp.ones(2))


AFTER = jnp.array([1.5, 0.45, 1.05])


def test_famo_two_calls():
    # The first step of Adam is the learning rate times the sign: -.025, .025, .025.
    chain = optax.chain(optax_mtl.famo(3, gamma=0.0), optax.scale(1.0))
    state = chain.init(None)
    _, state = chain.update(jnp.eye(3), state, losses=LOSSES)
    np.testing.assert_array_equal(optax.tree.get(state, "logits"), 0)
    state = jax.jit(optax_mtl.famo_update)(state, AFTER)
    update, state = chain.update(jnp.eye(3), state, losses=LOSSES)
    logits = optax.tree.get(state, "logits")
    np.testing.assert_allclose(logits, [-0.025, 0.025, 0.025], rtol=1e-4)
    np.testing.assert_allclose(update, weights.famo(logits, LOSSES), rtol=1e-6)
    np.testing.assert_array_equal(optax.tree.get(state, "losses_after"), 0)


def test_famo_one_call_compares_consecutive_losses():
    exact, short = optax_mtl.famo(3), optax_mtl.famo(3)
    state = exact.init(None)
    _, first = exact.update(jnp.eye(3), state, losses=LOSSES)
    told = optax_mtl.famo_update(first, AFTER)
    _, expected = exact.update(jnp.eye(3), told, losses=AFTER)
    _, found = short.update(jnp.eye(3), first, losses=AFTER)
    chex.assert_trees_all_close(found, expected)


def test_famo_gradient_is_that_of_the_paper():
    # z is the softmax; the derivative of <z, delta> is that of the loss to descend.
    logits, fall = jnp.array([0.1, -0.3, 0.2]), jnp.array([0.3, 0.1, -0.05])
    expected = jax.grad(lambda x: jax.nn.softmax(x) @ fall)(logits)
    found = famo_module.famo_gradient(logits, fall, jnp.ones(3, bool))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_famo_is_indifferent_to_the_units_of_the_losses():
    _, losses = random_batches(4, 3)
    units = np.float32([1e-12, 1, 1e6])
    eye = np.tile(np.eye(3, dtype=np.float32), (4, 1, 1))
    expected, _ = run(make("famo", 3), eye, losses)
    found, _ = run(make("famo", 3), eye, units * losses)
    weighted = found * units / np.sum(found * units, axis=1, keepdims=True)
    np.testing.assert_allclose(weighted, expected, rtol=1e-4)


def test_famo_update_refuses_and_survives():
    with pytest.raises(ValueError, match="no state of optax_mtl"):
        optax_mtl.famo_update(optax.sgd(0.1).init(None), AFTER)
    method = optax_mtl.famo(3)
    _, state = method.update(jnp.eye(3), method.init(None), losses=LOSSES)
    state = optax_mtl.famo_update(state, AFTER.at[1].set(jnp.nan))
    update, state = method.update(jnp.eye(3), state, losses=LOSSES)
    chex.assert_tree_all_finite((update, state))


@pytest.mark.parametrize("warmup_steps", [1, 3])
def test_excess_mtl_like_numpy(warmup_steps):
    batches, _ = random_batches(5, 3)
    method = make("excess_mtl", 3, eta=0.7, warmup_steps=warmup_steps)
    updates, _ = run(method, batches)
    squares, w, seen = np.zeros((3, 4)), np.ones(3), []
    for g, update in zip(batches, updates):
        squares += g**2
        excess = np.sum(g**2 / np.sqrt(squares), axis=1)
        if len(seen) < warmup_steps:
            seen.append(excess)
        else:
            w = w * np.exp(0.7 * excess / np.mean(seen, axis=0))
            w = 3 * w / w.sum()
        np.testing.assert_allclose(update, w @ g, rtol=1e-4, atol=1e-5)


def test_excess_mtl_does_not_overflow():
    batches = np.tile(np.float32([[1.0, 0.0], [0.0, 1.0]]), (50, 1, 1))
    updates, state = run(make("excess_mtl", 2, eta=1e4), batches)
    chex.assert_tree_all_finite((updates, state))


@pytest.mark.parametrize("lambda_map", ["projection", "softmax"])
@pytest.mark.parametrize("normalize", [None, "loss"])
def test_moco_like_numpy(lambda_map, normalize):
    batches, losses = random_batches(4, 3)
    options = {"beta": 0.9, "gamma": 0.2, "rho": 0.1, "beta_sigma": 0.3}
    method = make("moco", 3, normalize=normalize, lambda_map=lambda_map, **options)
    updates, _ = run(method, batches, losses)
    tracked, w = np.zeros((3, 4)), np.full(3, 1 / 3)
    for k, (g, loss, update) in enumerate(zip(batches, losses, updates), 1):
        if normalize == "loss":
            g = g / np.linalg.norm(g, axis=1, keepdims=True) * loss[:, None]
        tracked += 0.9 / k**0.3 * (g - tracked)
        w = w - 0.2 / k**0.5 * (tracked @ tracked.T @ w + 0.1 * w)
        if lambda_map == "softmax":
            w = np.exp(w) / np.exp(w).sum()
        else:
            w = project_simplex(w)
        np.testing.assert_allclose(update, w @ tracked, rtol=1e-4, atol=1e-5)


def project_simplex(v):
    """By bisection on the threshold."""
    low, high = v.min() - 1, v.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if np.maximum(v - middle, 0).sum() > 1
            else (
                low,
                middle,
            )
        )
    return np.maximum(v - low, 0)


def test_modo_with_two_batches_like_numpy():
    (first, second), _ = random_batches(2, 3)
    method = make("modo", 3)
    update, state = method.update(
        first, method.init(None), second_updates=jnp.asarray(second)
    )
    w = np.full(3, 1 / 3)
    w = project_simplex(w - 0.1 * (first @ second.T @ w + 0.1 * w))
    np.testing.assert_allclose(state.weights, w, rtol=1e-5)
    np.testing.assert_allclose(update, w @ (first + second) / 2, rtol=1e-5, atol=1e-6)


def test_sdmgrad_inner_weights():
    w = sdmgrad_weights(J3 @ J3.T, 0.3, jnp.full(3, 1 / 3))
    np.testing.assert_allclose(w, [0.311605, 0.568625, 0.119771], atol=1e-6)


def test_sdmgrad_with_two_batches_like_numpy():
    (first, second), _ = random_batches(2, 3)
    method = make("sdmgrad", 3, regularization=0.5, preference=[0.2, 0.3, 0.5])
    second_updates = jnp.asarray(second)
    update, state = method.update(
        first, method.init(None), second_updates=second_updates
    )
    products, p, w = first @ second.T, np.array([0.2, 0.3, 0.5]), np.full(3, 1 / 3)
    for _ in range(20):
        step = products @ (w + 0.5 * p) / np.linalg.norm(products)
        w = project_simplex(w - step)
    np.testing.assert_allclose(state.weights, w, rtol=1e-4, atol=1e-6)
    expected = (w + 0.5 * p) / 1.5 @ (first + second) / 2
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)


def test_sdmgrad_with_the_same_batch_twice_approaches_the_exact_weights():
    method = make("sdmgrad", 3)

    def step(state, _):
        update, state = method.update(J3, state, second_updates=J3)
        return state, update

    _, updates = jax.lax.scan(step, method.init(None), length=20)
    expected, _ = method.update(J3, method.init(None))
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_second_batch_is_checked(name):
    method = make(name, 3)
    with pytest.raises(ValueError, match=r"num_tasks=3.*of 2 tasks"):
        method.update(J3, method.init(None), second_updates=J3[:2])
    bad = J3.at[0, 0].set(jnp.nan)
    update, state = method.update(J3, method.init(None), second_updates=bad)
    assert not jnp.any(jnp.isfinite(update))
    chex.assert_trees_all_equal(state, method.init(None))


def test_adatask_is_the_sum_of_adams():
    batches, _ = random_batches(4, 3)
    updates, _ = run(make("adatask", 3), batches)
    adam, expected = optax.scale_by_adam(), 0
    for i in range(3):
        state, out = adam.init(jnp.zeros(4)), []
        for g in batches[:, i]:
            update, state = adam.update(jnp.asarray(g), state)
            out.append(update)
        expected += np.stack(out)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)


def test_m_config_like_numpy_one_task_a_step():
    gradients, _ = random_batches(8, 3)
    task = np.arange(8) % 3
    cycle = np.eye(3, dtype=np.float32)[task][:, :, None]
    with jax.enable_x64(True):
        gradients = np.float64(gradients)
        updates, _ = run(make("m_config", 3), gradients * cycle)
    m, counts, f, s, t = np.zeros((3, 4)), np.zeros(3), 0, 0, 0
    for k, update in enumerate(updates):
        i = task[k]
        m[i] = 0.9 * m[i] + 0.1 * gradients[k, i]
        counts[i] += 1
        if k < 2:
            np.testing.assert_array_equal(update, 0)
            continue
        mean = m / (1 - 0.9**counts)[:, None]
        unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        best = np.linalg.pinv(unit) @ np.ones(3)
        best /= np.linalg.norm(best)
        d = np.sum(mean @ best) * best
        t += 1
        new = d * (1 - 0.9**t)
        s = 0.999 * s + 0.001 * ((new - 0.9 * f) / 0.1) ** 2
        f = new
        expected = d / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-8)


STATEFUL = [
    ("dwa", {"window": 1}),
    ("uncertainty_weighting", {}),
    ("gradnorm", {}),
    ("db_mtl", {}),
    ("imtl_l", {}),
    ("imtl", {}),
    ("stch", {"warmup_steps": 1, "window": 1}),
    ("famo", {}),
    ("excess_mtl", {}),
    ("moco", {}),
    ("modo", {}),
    ("adatask", {}),
    ("m_config", {}),
]


@pytest.mark.parametrize("name, options", STATEFUL)
def test_an_absent_task_is_as_if_it_did_not_exist(name, options):
    go = scan(make(name, 5, **options))
    batches, losses = random_batches(3, 5)
    # Absent in the last step, a task keeps its statistics.
    batches[2, 1], losses[2, 1] = 0, 0
    _, states = go(batches, losses)
    before, after = (jax.tree.map(lambda x, k=k: x[k], states) for k in (1, 2))
    rows = lambda state: [
        np.asarray(x[1]) for x in jax.tree.leaves(state) if x.shape[:1] == (5,)
    ]
    assert rows(before)
    if name == "excess_mtl":  # Logits are relative to the largest.
        before, after = (s._replace(logits=s.logits[1:2]) for s in (before, after))
    for old, new in zip(rows(before), rows(after)):
        if name == "famo" and not np.any(new):
            continue  # `losses_after` was used up.
        np.testing.assert_allclose(new, old, rtol=1e-6)

    # Absent in all steps, the others get what they would get without it.
    batches[:, 1], losses[:, 1] = 0, 0
    others = np.array([0, 2, 3, 4])
    found, _ = go(batches, losses)
    expected, _ = run(make(name, 4, **options), batches[:, others], losses[:, others])
    if name != "m_config":  # It waits until every task was seen.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_smooth_weights_like_numpy():
    batches, _ = random_batches(5, 3)
    batches[3, 0] = 0
    inner = optax_mtl.mgda()
    updates, _ = run(optax_mtl.smooth_weights(inner, 3, decay=0.8), batches)
    smooth = None
    for g, update in zip(batches, updates):
        exists = np.any(g, axis=1)
        w = np.asarray(weights.mgda(jnp.asarray(g @ g.T)))
        new = w if smooth is None else 0.8 * smooth + 0.2 * w
        smooth = np.where(exists, new, 0 if smooth is None else smooth)
        expected = np.where(exists, smooth, 0) @ g
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


def test_update_every_step_is_every_step():
    batches, losses = random_batches(4, 3)
    for name in ("dwa", "pcgrad"):
        method = make(name, 3)
        found, _ = run(optax_mtl.update_every(method, 1, 3), batches, losses)
        expected, _ = run(method, batches, losses)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_update_every_reuses_the_weights():
    batches, _ = random_batches(5, 3)
    updates, _ = run(optax_mtl.update_every(optax_mtl.mgda(), 2, 3), batches)
    for k in range(5):
        g = jnp.asarray(batches[k - k % 2])
        expected = weights.mgda(g @ g.T) @ batches[k]
        np.testing.assert_allclose(updates[k], expected, rtol=1e-4, atol=1e-5)


def test_update_every_computes_the_gram_matrix_only_then():
    calls = []
    batches, _ = random_batches(5, 3)
    method = optax_mtl.update_every(optax_mtl.smooth_weights(optax_mtl.mgda(), 3), 3, 3)

    def compute(g):
        jax.debug.callback(lambda: calls.append(1))
        return g @ g.T

    @jax.jit
    def step(g, state):
        return method.update(optax_mtl.GramView(3, lambda: compute(g)), state)

    state = method.init(None)
    for g in batches:
        _, state = step(jnp.asarray(g), state)
    jax.effects_barrier()
    assert len(calls) == 2  # Steps 0 and 3.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: optax_mtl.smooth_weights(m, 3),
        lambda m: optax_mtl.update_every(optax_mtl.smooth_weights(m, 3), 2, 3),
    ],
)
def test_wrappers_through_the_gram_matrix_alone(wrap):
    method = wrap(optax_mtl.pcgrad())
    target = jnp.asarray(random_batches(1, 3)[0][0])
    losses_fn = lambda x, shift: jnp.sum((x - target - shift) ** 2, axis=1)
    fns = [
        jax.jit(optax_mtl.value_and_grad(losses_fn, method, mode=mode))
        for mode in ("gram", "stacked")
    ]
    params = jnp.ones((1, 4))
    states = [method.init(params)] * 2
    for k in range(3):
        outs = [fn(params, s, 0.5 * k) for fn, s in zip(fns, states)]
        np.testing.assert_allclose(outs[0][1], outs[1][1], rtol=1e-4, atol=1e-5)
        states = [out[2] for out in outs]


@pytest.mark.parametrize("name", ["inverse_norm", "gradnorm", "moco"])
def test_per_group_is_one_method_for_each(name):
    batches, losses = random_batches(3, 3, size=6)
    split = lambda g: {"a": {"kernel": g[:, :2], "bias": g[:, 2:4]}, "b": g[:, 4:]}
    params = {"a": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}, "b": jnp.zeros(2)}
    by_path = lambda path: path.split("/")[0]
    tree = {"a": {"kernel": "first", "bias": "first"}, "b": "second"}
    for labels in (by_path, tree)[: 2 if name == "inverse_norm" else 1]:
        method = optax_mtl.per_group(make(name, 3), labels)
        step = jax.jit(
            lambda u, s, losses, m=method: m.update(u, s, params, losses=losses)
        )
        state, found = method.init(params), []
        for g, loss in zip(batches, losses):
            update, state = step(split(jnp.asarray(g)), state, loss)
            found.append(
                np.concatenate(
                    [update["a"]["kernel"], update["a"]["bias"], update["b"]]
                )
            )
        first, _ = run(make(name, 3), batches[:, :, :4], losses)
        second, _ = run(make(name, 3), batches[:, :, 4:], losses)
        expected = np.concatenate([first, second], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["inverse_norm", "gradnorm", "pcgrad"])
def test_sharded_parameters_on_four_devices_as_on_one(name):
    (first, second), (losses, _) = random_batches(2, 3, size=12)
    updates = {"w": jnp.asarray(first), "b": jnp.asarray(second[:, :2])}
    params = jax.tree.map(lambda x: x[0], updates)
    method = make(name, 3)
    sharded = {"w": True, "b": False}
    wrapped = optax_mtl.with_sharded_parameters(method, "shard", sharded=sharded)
    mesh = Mesh(np.array(jax.devices()[:4]), "shard")
    state = method.init(params)

    step = jax.jit(
        jax.shard_map(
            lambda u: wrapped.update(u, state, losses=losses),
            mesh=mesh,
            in_specs=({"w": PartitionSpec(None, "shard"), "b": PartitionSpec()},),
            out_specs=(
                {"w": PartitionSpec("shard"), "b": PartitionSpec()},
                PartitionSpec(),
            ),
        )
    )
    found = step(updates)
    expected = method.update(updates, state, params, losses=losses)
    unwrap = optax.tree.unwrap_random_key_data
    chex.assert_trees_all_close(unwrap(found), unwrap(expected), rtol=1e-4, atol=1e-5)


def test_log_losses_in_front_of_a_method():
    # The gradients of log losses are those of losses of any unit.
    batches, losses = random_batches(2, 3)
    chain = optax.chain(optax_mtl.log_losses(), optax_mtl.pcgrad())
    found, _ = run(chain, batches, losses)
    units = np.float32([10, 0.1, 1])
    expected, _ = run(chain, units[:, None] * batches, units * losses)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
