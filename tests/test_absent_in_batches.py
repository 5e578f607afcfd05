"""Tasks whose labels are missing in some of the micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_mtl

T, K, BATCH, WIDTH = 3, 6, 24, 4
MASK = {"trunk": True, "heads": False, "common": False}


@functools.cache
def problem():
    """Regression on a trunk, three heads and a leaf that all heads share; masks.

    Micro-batch k holds the examples k, k + K, ... The first task has labels in all of
    them, more in some than in others; the second in micro-batch 4 alone; the third,
    whose turn is in 2 and 5, in 2 and 3.
    """
    rng = np.random.default_rng(0)
    params = {
        "trunk": rng.normal(size=(WIDTH, WIDTH)),
        "heads": [rng.normal(size=WIDTH) for _ in range(T)],
        "common": rng.normal(size=WIDTH),
    }
    inputs, targets = rng.normal(size=(BATCH, WIDTH)), rng.normal(size=(BATCH, T))
    batch = np.arange(BATCH) % K
    has = [rng.uniform(size=BATCH) < 0.7, batch == 4, (batch == 2) | (batch == 3)]
    mask = np.stack(has, axis=1).astype(float)
    mask[:K, 0] = 1
    mask[4, 1] = mask[3, 2] = 0
    return params, (inputs, targets, mask)


def masked_losses(params, inputs, targets, mask):
    features = inputs @ params["trunk"]
    heads = jnp.stack([head + params["common"] for head in params["heads"]])
    errors = features @ heads.T - targets
    return jnp.sum(mask * errors**2, axis=0) / jnp.maximum(mask.sum(axis=0), 1)


def reference(weights, params, inputs, targets, mask):
    """Losses and gradients of sums over examples with weights, `(BATCH, T)`; NumPy.

    Row i of the first are the gradients of task i; a head and the common leaf get the
    sum over the tasks.
    """
    features = inputs @ params["trunk"]
    heads = np.stack([head + params["common"] for head in params["heads"]])
    weights = weights * mask
    errors = features @ heads.T - targets
    pulled = 2 * weights * errors
    of_heads = pulled.T @ features
    return np.sum(weights * errors**2, axis=0), {
        "trunk": np.einsum("nt,ni,tj->tij", pulled, inputs, heads),
        "heads": list(of_heads),
        "common": of_heads.sum(axis=0),
    }


def average_weights(mask, one_task_each, per_batch):
    """Of each example in the average of its task, by labels or by micro-batches."""
    batch = np.arange(len(mask)) % K
    if one_task_each:
        mask = mask * (batch[:, None] % T == np.arange(T))
    labels = np.stack([mask[batch == k].sum(axis=0) for k in range(K)])
    if not per_batch:
        return mask / labels.sum(axis=0)
    each = np.divide(mask, labels[batch], where=mask > 0, out=np.zeros_like(mask))
    return each / (labels > 0).sum(axis=0)


def count_labels(inputs, targets, mask):
    return mask.sum(axis=0)


def assert_close(tree, other, tolerance=1e-12):
    close = lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance)
    jax.tree.map(close, tree, other)


@pytest.mark.parametrize("one_task_each", [False, True])
@pytest.mark.parametrize("num_labels", [None, count_labels])
def test_averages_over_labels_and_over_micro_batches(one_task_each, num_labels):
    params, batch = problem()
    weights = average_weights(batch[2], one_task_each, per_batch=num_labels is None)
    losses, grads = reference(weights, params, *batch)
    if num_labels and not one_task_each:  # The whole batch in one piece.
        assert_close(masked_losses(params, *batch), losses, 1e-5)
    with jax.enable_x64(True):
        fn = optax_mtl.accumulate_task_grads(
            masked_losses,
            K,
            shared=MASK,
            one_task_each=one_task_each,
            num_labels=num_labels,
        )
        actual_losses, actual = jax.jit(fn)(params, *batch)
        assert_close(actual_losses, losses)
        if num_labels is None:
            # What all tasks share beside the trunk counts no task: see the docstring.
            del grads["common"], actual["common"]
        assert_close(actual, grads)


def test_one_label_each_is_the_plain_mean():
    params, batch = problem()
    labels = np.stack([batch[2][k::K].sum(axis=0) for k in range(K)])
    weights = batch[2] / np.maximum(np.tile(labels, (BATCH // K, 1)), 1) / K
    with jax.enable_x64(True):
        fn = optax_mtl.accumulate_task_grads(
            masked_losses, K, shared=MASK, num_labels=lambda *_: jnp.ones(T)
        )
        assert_close(jax.jit(fn)(params, *batch), reference(weights, params, *batch))


@pytest.mark.parametrize("one_task_each", [False, True])
@pytest.mark.parametrize("given", ["losses", "nothing", "num_labels"])
def test_multi_steps_is_accumulate_task_grads(one_task_each, given):
    params, batch = problem()
    mask = None if given == "num_labels" and not one_task_each else MASK
    fn = optax_mtl.accumulate_task_grads(
        masked_losses,
        K,
        shared=mask,
        one_task_each=one_task_each,
        num_labels=count_labels if given == "num_labels" else None,
    )

    def hand_over(updates, state, params=None, *, losses=None):
        return updates, state if losses is None else losses

    chain = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(T), hand_over)
    tx = optax_mtl.multi_steps(chain, K, T, shared=mask, one_task_each=one_task_each)

    def step(state, step):
        micro = jax.tree.map(lambda x: x[:, step], pieces)
        one = lambda params: masked_losses(params, *micro)
        if one_task_each:
            one_loss = lambda params: one(params)[step % T]
            losses, grads = jax.value_and_grad(one_loss)(params)
        else:
            losses, grads = optax_mtl.value_and_task_grads(one, shared=mask)(params)
        extra = {} if given == "nothing" else {"losses": losses}
        if given == "num_labels":
            extra["num_labels"] = count_labels(*micro)
        return tx.update(grads, state, params, **extra)[::-1]

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        pieces = [
            jnp.reshape(jnp.asarray(x), (BATCH // K, K, *x.shape[1:])) for x in batch
        ]
        steps = jnp.arange(K)
        scan = jax.jit(lambda: jax.lax.scan(step, tx.init(params), steps))
        state, updates = scan()
        losses, grads = jax.jit(fn)(params, *batch)
        last = jax.tree.map(lambda x: x[-1], updates)
        if given == "num_labels" and one_task_each:
            del last["common"], grads["common"]  # As without labels.
        assert_close(last, grads)
        if given != "nothing":
            assert_close(state.inner_opt_state, losses)


def test_counts_that_cannot_be_used_are_refused():
    params, batch = problem()
    fn = optax_mtl.accumulate_task_grads(
        masked_losses, K, num_labels=lambda *_: jnp.ones(2)
    )
    with pytest.raises(ValueError, match="labels of 2 tasks, but there are 3 losses"):
        jax.eval_shape(fn, params, *batch)
    tx = optax_mtl.multi_steps(optax_mtl.linear(), K, T, shared=MASK)
    grads = {**params, "trunk": np.zeros((T, WIDTH, WIDTH))}
    params = jax.tree.map(jnp.asarray, params)
    with pytest.raises(ValueError, match="accumulate_task_grads"):
        tx.update(grads, tx.init(params), params, num_labels=jnp.ones(T))


def test_a_loss_that_is_always_zero_has_a_gradient():
    """Such as a surrogate whose value does not matter: averaged over all batches."""
    surrogate = lambda w, x: jnp.stack([jnp.sum(w * x), jnp.sum(w * x)])
    at_zero = lambda w, x: surrogate(w, x) - jax.lax.stop_gradient(surrogate(w, x))
    fn = optax_mtl.accumulate_task_grads(at_zero, 2)
    losses, grads = fn(jnp.ones([]), jnp.array([1.0, 2, 3, 6]))
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_allclose(grads, [6, 6])


def test_a_batch_that_is_not_finite_shows():
    fn = optax_mtl.accumulate_task_grads(lambda w, x: {"a": w * x.sum()}, 2)
    losses, grads = fn(jnp.ones([]), jnp.array([1.0, np.nan]))
    assert np.isnan(losses["a"]) and np.isnan(grads).all()


def test_gradients_that_shard_map_sums_count_a_task_present_on_any_device():
    """Parameters that do not vary: each pull-back sums over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    losses_fn = lambda w, x: {"a": jnp.sum(w * x), "b": jnp.sum(w * x) ** 2}
    fn = optax_mtl.accumulate_task_grads(losses_fn, 2)
    sharded = jax.shard_map(
        lambda w, x: fn(w, x)[1], mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    # Micro-batches 1 and 0 on the first device, 3 and 0 on the second.
    grads = jax.jit(sharded)(jnp.ones([]), jnp.array([1.0, 0, 3, 0]))
    np.testing.assert_allclose(grads, [1 + 3, 2 * (1 + 9)])
