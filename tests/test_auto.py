"""The way that ``value_and_grad`` chooses: as exact as the others, no pass too many."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl.gradients import backward
from tests.common import compiled_fast, flops

WIDTH, DEPTH, BATCH = 32, 6, 32
SHARED = {"trunk": True, "heads": False}


def problem(num_tasks):
    """Parameters and named losses of a trunk with heads."""
    rng = np.random.default_rng(num_tasks)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5
    params = {
        "trunk": [draw(WIDTH, WIDTH) for _ in range(DEPTH)],
        "heads": [draw(WIDTH, 2) for _ in range(num_tasks)],
    }
    inputs, targets = draw(BATCH, WIDTH), draw(num_tasks, BATCH, 2)

    def losses_fn(params):
        hidden = inputs
        for w in params["trunk"]:
            hidden = jnp.tanh(hidden @ w)
        error = lambda w, target: jnp.mean((hidden @ w - target) ** 2)
        pairs = enumerate(zip(params["heads"], targets, strict=True))
        return {f"{i:02}": error(*pair) for i, pair in pairs}

    return params, losses_fn


def in_mode(mode, losses_fn, method, params):
    fn = optax_mtl.value_and_grad(losses_fn, method, mode=mode, shared=SHARED)
    state = fn.init(params)
    return lambda params: fn(params, state)[:2]


def plain_flops(losses_fn, params):
    return flops(jax.value_and_grad(lambda p: sum(losses_fn(p).values())), params)


@pytest.mark.parametrize("num_tasks", [3, 9])  # Kept, and pulled back once more.
def test_result_and_cost_are_those_of_the_best_way(num_tasks):
    params, losses_fn = problem(num_tasks)
    method = optax_mtl.upgrad()
    run = lambda mode: in_mode(mode, losses_fn, method, params)
    both = compiled_fast(lambda p: [run(mode)(p)[1] for mode in ("auto", "stacked")])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        *both(params),
    )
    best = min(flops(run(mode), params) for mode in ("leafwise", "stacked"))
    assert flops(run("auto"), params) <= 1.15 * best


def test_many_or_large_gradients_are_not_kept(monkeypatch):
    params, losses_fn = problem(3)
    method = optax_mtl.upgrad()
    cost = lambda mode: flops(in_mode(mode, losses_fn, method, params), params)
    kept = cost("auto")
    size = sum(x.nbytes for x in params["trunk"])
    monkeypatch.setattr(backward, "MAX_KEPT_BYTES", 3 * size - 1)
    assert cost("auto") == cost("leafwise") > kept


def test_losses_alone_take_one_backward_pass_and_gradients_the_stacked_way():
    params, losses_fn = problem(4)
    run = lambda mode, method: in_mode(mode, losses_fn, method, params)
    by_losses = flops(run("auto", optax_mtl.dwa(4)), params)
    assert by_losses <= 1.05 * plain_flops(losses_fn, params)
    for method in (
        optax_mtl.graddrop(),
        optax.chain(optax_mtl.per_task(optax.clip(1.0), 4), optax_mtl.upgrad()),
    ):
        auto, stacked = (
            compiled_fast(run(mode, method))(params)[1] for mode in ("auto", "stacked")
        )
        jax.tree.map(np.testing.assert_array_equal, auto, stacked)


def test_what_is_measured_inside_a_branch_is_pulled_back_anew():
    """Gradients that a branch computed are not there outside of it."""
    params, losses_fn = problem(3)
    method = optax_mtl.update_every(optax_mtl.upgrad(), 2, 3)
    auto, stacked = (
        compiled_fast(in_mode(mode, losses_fn, method, params))(params)[1]
        for mode in ("auto", "stacked")
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        auto,
        stacked,
    )


@pytest.mark.parametrize("equations", [1, 130, 10**6])
def test_passes_are_shared_as_far_as_the_compiler_asks(equations, monkeypatch):
    """All tasks in one pass, some in each, or one: the same gradients."""
    num_tasks = 7
    params, losses_fn = problem(num_tasks)
    monkeypatch.setattr(backward, "MAX_EQUATIONS", equations)
    task_grads = optax_mtl.value_and_task_grads(losses_fn, shared=SHARED)
    _, updates = jax.jit(task_grads)(params)
    expected = jax.jit(jax.jacrev(lambda p: jnp.stack(list(losses_fn(p).values()))))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        updates["trunk"],
        expected(params)["trunk"],
    )


def test_named_heads_cost_each_task_its_own(monkeypatch):
    """Written out, T tasks cost T backward passes, each through one head."""
    num_tasks = 16
    params, losses_fn = problem(num_tasks)
    cost = lambda: flops(
        optax_mtl.value_and_task_grads(losses_fn, shared=SHARED), params
    )
    apart = cost()
    floor = (1 + 2 * num_tasks) / 3 * plain_flops(losses_fn, params)
    assert apart <= 1.1 * floor
    monkeypatch.setattr(backward, "MAX_EQUATIONS", 1)
    assert cost() > apart


def test_nothing_of_a_branch_is_kept():
    """A gradient that outlives the branch would be a leak, used or not."""
    params, losses_fn = problem(3)
    method = optax_mtl.upgrad()
    for held in (method, optax_mtl.zero_nonfinite(method)):
        step = in_mode("auto", losses_fn, optax_mtl.update_every(held, 2, 3), params)
        with jax.checking_leaks():
            jax.make_jaxpr(step)(params)


@pytest.mark.parametrize("named", [True, False])
def test_tasks_left_out_cost_no_pass_and_spoil_nothing(named):
    params, losses_fn = problem(3)

    def spoilt(params):
        losses = losses_fn(params)
        losses["01"] = losses["01"] * jnp.nan
        return losses if named else jnp.stack(list(losses.values()))

    method = optax_mtl.zero_nonfinite(optax_mtl.upgrad())
    both = {mode: in_mode(mode, spoilt, method, params) for mode in ("auto", "stacked")}
    trunks = [compiled_fast(step)(params)[1]["trunk"] for step in both.values()]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *trunks
    )
    # By name, those that are left are finite.
    assert np.any(np.asarray(trunks[0][0])) == named
    assert flops(both["auto"], params) <= 1.1 * flops(both["stacked"], params)
