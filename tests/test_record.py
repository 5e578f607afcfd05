"""What is recorded is what was there: against NumPy, and in any state that holds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_mtl
from optax_mtl import nnx as mtl_nnx
from optax_mtl.linen import TrainState

RNG = np.random.default_rng(0)
STEPS, T, SIZE = 6, 3, 5
GRADIENTS = RNG.normal(size=(STEPS, T, SIZE)).astype(np.float32)
GRADIENTS[2, 1] = 0  # Absent.
GRADIENTS[4, 0, 0] = np.nan
LOSSES = RNG.uniform(0.5, 2, size=(STEPS, T)).astype(np.float32)
FINITE = [0, 1, 2, 3, 5]


def states_after(tx, gradients=GRADIENTS, losses=LOSSES):
    """Updates and states of all steps."""

    def step(state, batch):
        update, state = tx.update(batch[0], state, losses=batch[1])
        return state, (update, state)

    run = lambda *batches: jax.lax.scan(step, tx.init(jnp.zeros(SIZE)), batches)[1]
    return jax.jit(run)(gradients, losses)


def last(states):
    return jax.tree.map(lambda x: x[-1], states)


@pytest.mark.parametrize("decay", [0.8, 1.0, 0.0])
def test_running_means_like_numpy(decay):
    """Of those that are there; a step that is not finite is left out."""
    recorder = optax_mtl.record_conflicts(T, decay=decay)
    record = optax_mtl.recorded(last(states_after(recorder)[1]))
    gradients = GRADIENTS[FINITE].astype(np.float64)
    norms = np.linalg.norm(gradients, axis=-1)
    units = gradients / np.where(norms > 0, norms, 1)[..., None]
    cosines = units @ units.swapaxes(1, 2)
    there = norms > 0
    both = there[:, :, None] & there[:, None]

    def average(x, there):
        """Decayed by each step in which it is there."""
        later = there[::-1].cumsum(axis=0)[::-1] - there
        weights = np.where(there, float(decay) ** later, 0)
        return (weights * x).sum(axis=0) / weights.sum(axis=0)

    always = np.ones(len(FINITE), int)
    np.testing.assert_allclose(record.mean.norms, average(norms, there), rtol=1e-5)
    np.testing.assert_allclose(
        record.mean.cosines, average(cosines, both), rtol=1e-4, atol=1e-6
    )
    upper = np.triu(np.ones((T, T), bool), 1)
    lowest = np.where(both & upper, cosines, 1).min(axis=(1, 2))
    np.testing.assert_allclose(
        record.mean.min_cosine, average(lowest, always), rtol=1e-4
    )
    total = np.linalg.norm(gradients.sum(axis=1), axis=-1) / norms.sum(axis=1)
    np.testing.assert_allclose(record.mean.alignment, average(total, always), rtol=1e-4)
    np.testing.assert_array_equal(record.seen, both.sum(axis=0))
    opposed = (both & (cosines < 0)).sum(axis=0)
    np.testing.assert_allclose(record.conflicting, opposed / both.sum(axis=0))
    expected = optax_mtl.conflicts(optax_mtl.gram(jnp.asarray(GRADIENTS[-1])))
    np.testing.assert_allclose(record.last.cosines, expected.cosines, rtol=1e-5)
    assert record.weights is None and record.mean_weights is None


@pytest.mark.parametrize("name", ["cagrad", "famo", "gcond", "priority_projection"])
def test_a_recorder_changes_nothing(name):
    """In front of products, losses and gradients: updates and state of the method."""
    method = optax_mtl.get(name, T)
    alone = states_after(method)
    chain = states_after(optax.chain(optax_mtl.record_conflicts(T), method))
    found = chain[0], chain[1][1]
    unwrap = optax.tree.unwrap_random_key_data
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        unwrap(found),
        unwrap(alone),
    )


def test_weights_that_the_method_used():
    """MGDA's of orthogonal gradients: inverse squared lengths."""
    lengths = np.array([[1, 2, 0], [1, 1, 1]], np.float32)
    gradients = lengths[:, :, None] * np.eye(T, SIZE, dtype=np.float32)
    recorder = optax_mtl.record_conflicts(T, optax_mtl.mgda(), decay=0.5)
    updates, states = states_after(recorder, gradients, np.ones((2, T)))
    record = optax_mtl.recorded(last(states))
    np.testing.assert_allclose(record.weights, np.ones(3) / 3, rtol=1e-5)
    first, second = np.array([0.8, 0.2, 0]), np.ones(3) / 3
    expected = (0.5 * first + second) / 1.5
    expected[2] = 1 / 3  # Absent in the first step.
    np.testing.assert_allclose(record.mean_weights, expected, rtol=1e-5)
    expected, _ = states_after(optax_mtl.mgda(), gradients, np.ones((2, T)))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_around_a_method_that_reads_gradients():
    recorder = optax_mtl.record_conflicts(T, optax_mtl.graddrop())
    with pytest.raises(TypeError, match="record_conflicts works with the weights"):
        recorder.update(GRADIENTS[0], recorder.init(jnp.zeros(SIZE)))


def test_only_every_third_step():
    recorder = optax_mtl.record_conflicts(T, every=3, decay=1.0)
    record = optax_mtl.recorded(last(states_after(recorder)[1]))
    norms = np.linalg.norm(GRADIENTS[[0, 3]], axis=-1)
    np.testing.assert_allclose(record.mean.norms, norms.mean(axis=0), rtol=1e-5)


def linear_losses(params, x):
    hidden = jnp.tanh(x @ params["trunk"]) @ params["last"]
    return {name: jnp.mean(hidden[:, i] ** 2) for i, name in enumerate("abc")}


PARAMS = {
    "trunk": RNG.normal(size=(7, 40)).astype(np.float32),
    "last": RNG.normal(size=(40, T)).astype(np.float32),
}
X = RNG.normal(size=(30, 7)).astype(np.float32)


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_one_gram_matrix_for_recorder_and_method(mode):
    """By the compiler's count; the second would be a fifth of all and more."""

    def compiled(method):
        resolve = optax_mtl.value_and_grad(linear_losses, method, mode=mode)
        state = resolve.init(PARAMS)
        return jax.jit(resolve).lower(PARAMS, state, X).compile()

    flops = lambda program: program.cost_analysis()["flops"]
    alone = flops(compiled(optax_mtl.mgda()))
    recorder = optax_mtl.record_conflicts(T)
    assert flops(compiled(optax.chain(recorder, optax_mtl.mgda()))) < 1.02 * alone
    around = optax_mtl.record_conflicts(T, optax_mtl.mgda())
    assert flops(compiled(around)) < 1.02 * alone


def test_groups_have_names():
    labels = lambda path: "block 1" if path == "trunk" else "block 2"
    recorder = optax_mtl.per_group(optax_mtl.record_conflicts(T), labels)
    tx = optax.chain(recorder, optax_mtl.mgda(), optax.adam(0.1))
    losses, grads = optax_mtl.value_and_task_grads(linear_losses)(PARAMS, X)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)
    records = optax_mtl.recorded(state, names=losses)
    assert list(records) == ["block 1", "block 2"]
    for group, leaf in zip(records.values(), ("trunk", "last")):
        expected = optax_mtl.conflicts(optax_mtl.gram(grads[leaf]))
        np.testing.assert_allclose(group.last.cosines, expected.cosines, rtol=1e-5)
        assert group.mean.names == ("a", "b", "c")


def test_two_recorders_in_a_chain():
    """Before and after what happens in front of the method."""
    clip = optax_mtl.per_task(optax.clip_by_global_norm(1.0), T)
    recorder = optax_mtl.record_conflicts(T)
    chain = optax.chain(recorder, clip, recorder, optax_mtl.mgda())
    _, state = chain.update(GRADIENTS[0], chain.init(jnp.zeros(SIZE)))
    first, second = optax_mtl.recorded(state).values()
    assert first.last.norms.max() > 1 and second.last.norms.max() < 1.001


WRAPPED = {
    "chain": lambda tx: tx,
    "apply_if_finite": lambda tx: optax_mtl.apply_if_finite(tx, 3),
    "multi_steps": lambda tx: optax_mtl.multi_steps(tx, 1, T),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "agreement": optax_mtl.scale_by_agreement,
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.1),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_found_in_any_state(wrapper):
    tx = WRAPPED[wrapper](optax.chain(optax_mtl.record_conflicts(T), optax_mtl.mgda()))
    state = tx.init(jnp.zeros(SIZE))
    _, state = tx.update(GRADIENTS[0], state, jnp.zeros(SIZE), losses=LOSSES[0])
    found = optax_mtl.recorded(state, names=["a", "b", "c"]).last
    expected = optax_mtl.conflicts(optax_mtl.gram(jnp.asarray(GRADIENTS[0])))
    np.testing.assert_allclose(found.cosines, expected.cosines, rtol=1e-5)
    assert "a " in str(found)


def test_found_in_flax():
    """An NNX optimizer, inside ``nnx.jit``; a Linen train state."""
    tx = optax.chain(optax_mtl.record_conflicts(2), optax_mtl.mgda(), optax.adam(0.1))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses_fn = lambda model, x: (model(x) ** 2).mean(axis=0)

    @nnx.jit
    def step(model, optimizer, x):
        losses, grads = mtl_nnx.value_and_task_grads(losses_fn)(model, x)
        optimizer.update(model, grads, losses=losses)

    step(model, optimizer, np.ones((4, 3), np.float32))
    record = optax_mtl.recorded(optimizer)
    assert record.seen.tolist() == [[1, 1], [1, 1]] and record.last.norms.min() > 0

    params = nn.Dense(2).init(jax.random.key(0), np.ones((1, 3)))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    _, grads = optax_mtl.value_and_task_grads(
        lambda p: (nn.Dense(2).apply(p, np.ones((4, 3))) ** 2).mean(axis=0)
    )(params)
    state = state.apply_gradients(grads=grads)
    assert optax_mtl.recorded(state).seen[0, 1] == 1


def test_nothing_recorded():
    with pytest.raises(ValueError, match=r"nothing was recorded.*record_conflicts"):
        optax_mtl.recorded(optax.adam(0.1).init(PARAMS))
