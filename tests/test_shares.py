"""Methods that give each task a share by the size of its gradient.

Expected values are those of the papers' formulae, in NumPy; the golden ones equal the
authors' code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mtl

J2 = np.array([[-4.0, 1, 1], [6, 1, 1]])
both_precisions = pytest.mark.parametrize(
    "double", [False, True], ids=["float32", "float64"]
)


def run(method, batches):
    """Updates of all steps."""

    @jax.jit
    def scan(batches):
        step = lambda state, u: method.update(u, state)[::-1]
        return jax.lax.scan(step, method.init(batches[0, 0]), batches)[1]

    return np.asarray(scan(jnp.asarray(batches, float)))


@both_precisions
def test_golden_loss_balancer(double):
    """Weights .030885 and .129777 in the second step, by EnCodec's code."""
    method = optax_mtl.loss_balancer(2, preference=[1, 4], decay=0.9)
    with jax.enable_x64(double):
        _, update = run(method, [J2, J2 * [[2], [1]]])
    np.testing.assert_allclose(update, [0.531582, 0.191547, 0.191547], atol=1e-6)
    averages = np.sqrt([18, 38]) * [(0.9 + 2) / 1.9, 1]
    exact = [0.2, 0.8] / averages @ (J2 * [[2], [1]])
    np.testing.assert_allclose(update, exact, rtol=1e-12 if double else 1e-5)


def test_loss_balancer_by_example_at_features():
    """As EnCodec has it: norms of the gradients of each example, on average."""
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(5, 3)), rng.normal(size=(3, 4))
    model = lambda params, x: {"a": x @ params, "b": jnp.tanh(x @ params)}
    losses_fn = lambda params, z, x: {
        "one": jnp.mean(z["a"] ** 2) + jnp.sum(z["b"]),
        "two": jnp.sum(jnp.abs(z["a"])) ** 2,
    }
    method = optax_mtl.loss_balancer(
        2, preference={"one": 1.0, "two": 2.0}, norm=3.0, per_example=True
    )
    resolve = optax_mtl.value_and_grad_at_features(model, losses_fn, method)
    with jax.enable_x64(True):
        _, found, state = jax.jit(resolve)(v, resolve.init(v, x), x)
    a = x @ v
    one = {"a": a / 10, "b": np.ones((5, 4))}
    two = {"a": 2 * np.abs(a).sum() * np.sign(a), "b": np.zeros((5, 4))}
    norms = [
        np.mean(np.sqrt((g["a"] ** 2 + g["b"] ** 2).sum(axis=1))) for g in (one, two)
    ]
    np.testing.assert_allclose(state.norms, norms, rtol=1e-9)
    weights = 3 * np.array([1, 2]) / 3 / norms
    at = {k: weights[0] * one[k] + weights[1] * two[k] for k in one}
    expected = x.T @ (at["a"] + at["b"] * (1 - np.tanh(a) ** 2))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_loss_balancer_keeps_the_average_of_an_absent_task():
    batches = np.stack([J2, J2 * [[0], [1]], 3 * J2])
    updates = run(optax_mtl.loss_balancer(2, decay=0.5), batches)
    np.testing.assert_allclose(updates[1], J2[1] / np.sqrt(38), rtol=1e-5)
    first = 3 / (0.5 * 1 + 1 * 3) * 1.5  # Seen twice: (0.5 n + 3 n) / 1.5.
    second = 3 / (0.25 + 0.5 + 3) * 1.75
    expected = first * J2[0] / 18**0.5 / 2 + second * J2[1] / 38**0.5 / 2
    np.testing.assert_allclose(updates[2], expected, rtol=1e-5)


def test_loss_balancer_by_example_refuses_parameters():
    method = optax_mtl.loss_balancer(2, per_example=True)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    updates = jax.tree.map(lambda p: jnp.zeros((2, *p.shape)), params)
    with pytest.raises(ValueError, match=r"'b': \(2,\).*for features"):
        method.update(updates, method.init(params), params)


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_adaptive_weight_at_the_last_layer(mode):
    """VQGAN's formula in NumPy, with the norms of the last matrix alone."""
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(3, 4)), "last": rng.normal(size=(4, 2))}
    x, v = rng.normal(size=(5, 3)), rng.normal(size=2)

    def losses_fn(params):
        out = x @ params["first"] @ params["last"]
        return {"rec": jnp.mean((out - 1) ** 2), "adversarial": -jnp.mean(out @ v)}

    method = optax_mtl.adaptive_weight(
        {"adversarial": 0.8, "rec": 0.0}, primary="rec", epsilon=1e-4
    )
    measure = lambda path: path == "last"
    resolve = optax_mtl.value_and_grad(losses_fn, method, mode=mode, measure=measure)
    with jax.enable_x64(True):
        _, found, _ = jax.jit(resolve)(params, resolve.init(params))
    hidden = x @ params["first"]
    cotangents = [(hidden @ params["last"] - 1) / 5, -np.tile(v, (5, 1)) / 5]
    norms = [np.linalg.norm(hidden.T @ c) for c in cotangents]
    total = cotangents[0] + 0.8 * norms[0] / (norms[1] + 1e-4) * cotangents[1]
    np.testing.assert_allclose(found["last"], hidden.T @ total, rtol=1e-9)
    expected = x.T @ total @ params["last"].T
    np.testing.assert_allclose(found["first"], expected, rtol=1e-9)


def test_lr_annealing_like_numpy_with_tasks_absent():
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(5, 3, 4)) * [[1.0], [10], [0.1]]
    batches[1, 0] = batches[2, 1] = batches[3] = 0
    with jax.enable_x64(True):
        updates = run(optax_mtl.lr_annealing(3, primary=1, decay=0.7), batches)
    weights = np.ones(3)
    for g, update in zip(batches, updates):
        for i in (0, 2):
            if g[i].any() and g[1].any():
                ratio = np.abs(g[1]).max() / np.abs(g[i]).mean()
                weights[i] = 0.7 * weights[i] + 0.3 * ratio
        np.testing.assert_allclose(update, weights @ g, rtol=1e-9)


def test_lr_annealing_measures_all_parameters():
    """The mean is over all entries, not over the means of the tensors."""
    updates = {"a": jnp.array([[1.0, -8], [1, 3]]), "b": jnp.array([2.0, 5])}
    method = optax_mtl.lr_annealing(2, decay=0.0)
    update, _ = method.update(updates, method.init({"a": jnp.zeros(2), "b": 0.0}))
    np.testing.assert_allclose(update["b"], 2 + 8 / 3 * 5, rtol=1e-6)
