"""Methods in which one task matters more than the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog

import optax_mtl
from tests.common import matrices

# The matrices of the golden values.
J2 = np.array([[-4.0, 1, 1], [6, 1, 1]])
J3 = np.array([[3.0, 1, 0, 1], [-2, 1, 1, 0], [1, -1, 2, 0.5]])
REGULAR = matrices("regular")  # Eight matrices of four gradients.


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def apply(method, updates, steps=1):
    """The last of some updates with the same gradients."""
    updates = jnp.asarray(updates, float)
    update_fn, state = jax.jit(method.update), method.init(updates[0])
    for _ in range(steps):
        update, state = update_fn(updates, state)
    return np.asarray(update), state


def batched(method):
    """The first update of a batch of matrices."""
    one = lambda updates: method.update(updates, method.init(updates[0]))[0]
    return jax.jit(jax.vmap(one))


def closest(target, constraints, lower):
    """The point closest to the target with `constraints @ x >= lower`."""
    # quadprog takes the constraints as columns.
    return quadprog.solve_qp(np.eye(len(target)), target, constraints.T, lower)[0]


class TestPriorityProjection:
    @pytest.mark.parametrize(
        "matrix, order, mode, weights",
        [
            # Ordered PCGrad; specification, computed there with NumPy.
            (J3, None, "gated", [1.454545, 1.166667, 1]),
            (J3, None, "cone", [1.454545, 1.166667, 1]),
            # Two tasks, by hand: the inner product is -22, the squares 18 and 38.
            (J2, None, "gated", [1 + 22 / 18, 1]),
            (J2, [1, 0], "gated", [1, 1 + 22 / 38]),
        ],
    )
    def test_golden_values(self, matrix, order, mode, weights, x64):
        method = optax_mtl.priority_projection(order, mode=mode)
        update, _ = apply(method, matrix)
        np.testing.assert_allclose(update, weights @ matrix, rtol=1e-5)

    def test_gated_projection_of_the_specification_conflicts(self, x64):
        update, _ = apply(optax_mtl.priority_projection(), J3)
        np.testing.assert_allclose(J3 @ update, [12.67, -1.27, 8.72], atol=5e-3)

    def test_gated_two_tasks_is_a_gem(self, x64):
        reference, gradient = J2
        projected = gradient - gradient @ reference / (reference @ reference) * (
            reference
        )
        update, _ = apply(optax_mtl.priority_projection(), J2)
        np.testing.assert_allclose(update, reference + projected)

    def test_cone_is_the_solution_of_quadratic_programs(self, x64):
        update = batched(optax_mtl.priority_projection(mode="cone"))(REGULAR)
        for matrix, actual in zip(REGULAR, update):
            expected = matrix[0] + sum(
                closest(matrix[i], matrix[:i], np.zeros(i)) for i in range(1, 4)
            )
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)

    def test_gated_projection_may_undo_another(self):
        # By hand: against the first, the last becomes (0, -1, 1), and against the
        # second (-0.4, -0.2, 1), which conflicts with the first.
        matrix = np.array([[1.0, 0, 0], [-0.5, 1, 0], [-0.1, -1, 1]])
        update, _ = apply(optax_mtl.priority_projection(), matrix)
        np.testing.assert_allclose(update, [1 - 0.4, 1 - 0.2, 1], rtol=1e-6)

    def test_always_is_gram_and_schmidt(self, x64):
        for matrix in np.random.default_rng(1).normal(size=(3, 4, 6)):
            q, r = np.linalg.qr(matrix.T)  # Column i of q, times r_ii, is what is left.
            expected = q @ np.diagonal(r)
            update, _ = apply(optax_mtl.priority_projection(mode="always"), matrix)
            np.testing.assert_allclose(update, expected, rtol=1e-9, atol=1e-12)

    def test_always_leaves_nothing_of_a_dependent_gradient(self):
        matrix = np.array([[1.0, 2, 3], [2, 1, 0], [3, 3, 3], [0, 0, 1]])
        with_it, _ = apply(optax_mtl.priority_projection(mode="always"), matrix)
        without, _ = apply(
            optax_mtl.priority_projection(mode="always"), matrix[[0, 1, 3]]
        )
        np.testing.assert_allclose(with_it, without, rtol=1e-5)

    @pytest.mark.parametrize("mode", ["gated", "always", "cone"])
    def test_order_is_a_permutation_of_the_tasks(self, mode, x64):
        weights_fn = optax_mtl.weights.priority_projection
        weights_fn = jax.jit(functools.partial(weights_fn, mode=mode))
        matrix = np.random.default_rng(2).normal(size=(4, 6))
        order = np.array([2, 0, 3, 1])
        actual = weights_fn(matrix @ matrix.T, order)[order]
        ordered = matrix[order]
        expected = weights_fn(ordered @ ordered.T, np.arange(4))
        np.testing.assert_allclose(actual, expected, rtol=1e-9)

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="'gated', 'always' or 'cone'"):
            optax_mtl.priority_projection(mode="never")
        with pytest.raises(ValueError, match="each task once"):
            optax_mtl.priority_projection([0, 0, 1])
        with pytest.raises(ValueError, match="one of 2 tasks, but there are 3"):
            apply(optax_mtl.priority_projection([1, 0]), J3)


class TestCosineGating:
    def test_follows_the_formula_of_the_paper(self, x64):
        for matrix in REGULAR:
            norms = np.linalg.norm(matrix, axis=1)
            cosines = matrix @ matrix[2] / (norms * norms[2])
            for weighted in (True, False):
                gates = np.maximum(cosines, 0) if weighted else 1.0 * (cosines >= 0)
                gates[2] = 1
                method = optax_mtl.cosine_gating(primary=2, weighted=weighted)
                update, _ = apply(method, matrix)
                np.testing.assert_allclose(update, gates @ matrix, rtol=1e-9)

    def test_orthogonal_gradients(self):
        matrix = np.array([[2.0, 0], [0, 3]])
        update, _ = apply(optax_mtl.cosine_gating(), matrix)
        np.testing.assert_array_equal(update, [2, 0])
        update, _ = apply(optax_mtl.cosine_gating(weighted=False), matrix)
        np.testing.assert_array_equal(update, [2, 3])

    def test_converges_to_stationary_points_of_the_primary_loss(self):
        matrix = np.array([[0.0, 0], [0, 3], [1, 1]])
        for weighted in (True, False):
            update, _ = apply(optax_mtl.cosine_gating(weighted=weighted), matrix)
            np.testing.assert_array_equal(update, [0, 0])


class TestDynamicBarrier:
    @pytest.mark.parametrize("beta", [0.3, 1.0])
    def test_is_the_closest_direction_with_progress_for_the_primary(self, beta, x64):
        for matrix in REGULAR:
            primary, secondary = matrix[1], matrix[[0, 2, 3]].sum(axis=0)
            lower = np.array([beta * primary @ primary])
            expected = closest(secondary, primary[None], lower)
            method = optax_mtl.dynamic_barrier(beta, primary=1)
            np.testing.assert_allclose(apply(method, matrix)[0], expected, rtol=1e-6)

    def test_without_a_primary_gradient_only_the_others_are_followed(self):
        matrix = np.array([[0.0, 0], [1, 2], [3, 4]])
        update, _ = apply(optax_mtl.dynamic_barrier(), matrix)
        np.testing.assert_array_equal(update, [4, 6])


class TestBloop:
    def test_follows_the_formulas_of_the_authors_code(self, x64):
        rng = np.random.default_rng(0)
        weight, rate = 0.3, 0.2
        variants = {
            "average": {},
            "gradient": {"subtract": "gradient"},
            "barrier": {"barrier": True},
            "rescale": {"rescale": True},
        }
        for name, options in variants.items():
            method = optax_mtl.bloop(weight, step_size=rate, **options)
            update_fn, state = jax.jit(method.update), method.init(jnp.zeros(5))
            average = None
            for _ in range(3):
                matrix = rng.normal(size=(3, 5)) + 2 * rng.normal(size=5)
                main, other = matrix[0], matrix[1] + matrix[2]
                average = main if average is None else average + rate * (main - average)
                ratio = other @ average / (average @ average)
                expected = {
                    "average": main + weight * (other - ratio * average),
                    "gradient": (1 - weight * ratio) * main + weight * other,
                    "barrier": main
                    + weight * (other - min(ratio, 1 / weight) * average),
                    "rescale": (main + weight * (other - ratio * average))
                    / (1 + weight),
                }[name]
                update, state = update_fn(jnp.array(matrix), state)
                np.testing.assert_allclose(update, expected, rtol=1e-9)
                np.testing.assert_allclose(state.average, average, rtol=1e-12)

    def test_what_is_added_is_orthogonal_to_the_average(self):
        rng = np.random.default_rng(1)
        method = optax_mtl.bloop(0.5, primary=1)
        params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
        update_fn, state = jax.jit(method.update), method.init(params)
        for _ in range(3):
            updates = jax.tree.map(
                lambda p: jnp.array(rng.normal(size=(3, *p.shape)), jnp.float32), params
            )
            update, state = update_fn(updates, state)
            added = jax.tree.map(lambda d, g: d - g[1], update, updates)
            flat = lambda tree: np.concatenate([np.ravel(x) for x in tree.values()])
            a, e = flat(added), flat(state.average)
            assert abs(a @ e) < 1e-6 * np.linalg.norm(a) * np.linalg.norm(e)
        assert state.steps == 3

    def test_with_a_barrier_and_no_average_is_a_dynamic_barrier(self, x64):
        weight = 0.4
        method = optax_mtl.bloop(weight, step_size=1.0, barrier=True)
        actual = batched(method)(matrices("any"))
        scales = np.array([1, weight, weight, weight])[:, None]
        expected = batched(optax_mtl.dynamic_barrier())(scales * matrices("any"))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)

    def test_absent_primary_task_leaves_the_average_alone(self):
        method = optax_mtl.bloop(0.5)
        updates = jnp.array([[0.0, 0], [1, 2]])
        update, state = method.update(updates, method.init(jnp.zeros(2)))
        np.testing.assert_array_equal(update, [0.5, 1])
        assert state.steps == 0
        _, state = method.update(jnp.array([[3.0, 0], [1, 2]]), state)
        update, after = method.update(updates, state)
        np.testing.assert_array_equal(update, [0, 1])  # Orthogonal to the average.
        np.testing.assert_array_equal(after.average, [3, 0])

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="'average' or 'gradient'"):
            optax_mtl.bloop(subtract="both")


class TestMetaBalance:
    def test_follows_the_authors_code_in_each_tensor(self, x64):
        rng = np.random.default_rng(0)
        relax, decay = 0.7, 0.9
        params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
        method = optax_mtl.metabalance(3, relax=relax, decay=decay, primary=1)
        update_fn, state = jax.jit(method.update), method.init(params)
        norms = {"a": np.zeros(3), "b": np.zeros(3)}
        for _ in range(3):
            updates = {k: rng.normal(size=(3, *p.shape)) for k, p in params.items()}
            update, state = update_fn(jax.tree.map(jnp.array, updates), state)
            for k, g in updates.items():
                expected = np.zeros(g.shape[1:])
                for i in (1, 0, 2):  # The code begins with the primary task.
                    norms[k][i] = decay * norms[k][i] + (1 - decay) * np.linalg.norm(
                        g[i]
                    )
                    scaled = norms[k][1] * g[i] / norms[k][i]
                    expected += relax * scaled + (1 - relax) * g[i]
                np.testing.assert_allclose(update[k], expected, rtol=1e-9)

    @pytest.mark.parametrize(
        "strategy, factors",
        [("both", [2, 1, 0.4]), ("reduce", [1, 1, 0.4]), ("enlarge", [2, 1, 1])],
    )
    def test_strategies_of_the_paper(self, strategy, factors):
        norms = np.array([1.0, 2, 5])
        method = optax_mtl.metabalance(3, relax=1.0, primary=1, strategy=strategy)
        update, _ = apply(method, np.diag(norms))
        np.testing.assert_allclose(update, factors * norms, rtol=1e-6)

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="'both', 'reduce' or 'enlarge'"):
            optax_mtl.metabalance(2, strategy="A")

    def test_without_relaxation_is_the_plain_sum(self):
        update, _ = apply(optax_mtl.metabalance(3, relax=0.0), J3)
        np.testing.assert_allclose(update, J3.sum(axis=0), rtol=1e-6)

    def test_tensor_of_one_task_stays_as_it_is(self):
        method = optax_mtl.metabalance(2)
        params = {"head": jnp.zeros(2), "shared": jnp.zeros(2)}
        updates = {
            "head": jnp.array([[0.0, 0], [3, 4]]),
            "shared": jnp.array([[1.0, 0], [0, 10]]),
        }
        update, state = method.update(updates, method.init(params))
        np.testing.assert_allclose(update["head"], [3, 4])
        np.testing.assert_allclose(update["shared"], [1, 0.7 + 3], rtol=1e-6)
        assert state.counts["head"].tolist() == [0, 1]

    def test_absent_task_keeps_its_norm(self):
        method = optax_mtl.metabalance(2, relax=1.0)
        _, state = method.update(jnp.eye(2) * 4, method.init(jnp.zeros(2)))
        # Twice as long an absence changes nothing; the bias is corrected.
        for _ in range(2):
            _, state = method.update(jnp.array([[4.0, 0], [0, 0]]), state)
        update, _ = method.update(jnp.eye(2) * 4, state)
        np.testing.assert_allclose(update, [4, 4], rtol=1e-6)


@functools.cache
def pcd_weights(num_tasks):
    """The weights of a first update of PCD, compiled."""

    def find(gram, tau):
        method = optax_mtl.pcd(num_tasks, tau=tau)
        view = optax_mtl.GramView(num_tasks, lambda: gram)
        return method.update(view, method.init(None))[0]

    return jax.jit(find)


def first_pcd(batch, tau):
    """First updates of PCD for a batch of matrices."""
    find = pcd_weights(batch.shape[1])
    return np.stack([find(optax_mtl.gram(x), float(tau)) @ x for x in batch])


class TestPCD:
    def test_golden_values(self, x64):
        # TorchJD 0.18.0, first call with the defaults.
        weights = pcd_weights(2)(jnp.array(J2 @ J2.T), 0.02)
        np.testing.assert_allclose(weights, [1.8481, 1.0954], atol=5e-5)
        update = weights @ J2
        np.testing.assert_allclose(update, [-0.8200, 2.9434, 2.9434], atol=5e-5)

    def test_closed_form_for_two_tasks(self, x64):
        batch = np.random.default_rng(0).normal(size=(4, 2, 5))
        norms = np.linalg.norm(batch, axis=2, keepdims=True)
        first, second = np.moveaxis(batch / norms, 1, 0)
        for tau in (0.0, 0.02, 0.5, 1.0):
            lacking = np.maximum(tau - np.sum(first * second, axis=1), 0)
            expected = first + lacking[:, None] * second
            expected *= norms[:, 0] / np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(first_pcd(batch, tau), expected, rtol=1e-9)

    @pytest.mark.parametrize("shape", [(3, 4), (9, 20)])
    def test_is_the_solution_of_a_quadratic_program(self, shape, x64):
        tau = np.linspace(0.02, 0.5, shape[0])
        primary = 1
        others = np.arange(shape[0]) != primary
        method = optax_mtl.pcd(shape[0], tau=tau, primary=primary)
        update_fn, state = jax.jit(method.update), method.init(jnp.zeros(shape[1]))
        squared = 0
        rng = np.random.default_rng(1)
        for step in range(1, 4):
            matrix = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))
            squared = 0.999 * squared + 0.001 * np.sum(matrix**2, axis=1)
            typical = np.sqrt(squared / (1 - 0.999**step))
            scaled = matrix / typical[:, None]
            lower = tau * np.sum(scaled**2, axis=1)
            direction = closest(scaled[primary], scaled[others], lower[others])
            size = np.linalg.norm(matrix[primary]) / np.linalg.norm(direction)
            update, state = update_fn(jnp.array(matrix), state)
            np.testing.assert_allclose(update, size * direction, rtol=1e-5, atol=1e-7)

    def test_has_the_norm_of_the_primary_gradient(self, x64):
        update = np.asarray(first_pcd(REGULAR, 0.02))
        norms = np.linalg.norm(update, axis=1)
        np.testing.assert_allclose(norms, np.linalg.norm(REGULAR[:, 0], axis=1))

    def test_constraints_that_cannot_be_met_are_dropped(self):
        rng = np.random.default_rng(2)
        g, h, e = rng.normal(size=(3, 8))
        batch = np.array([[g, h, -h], [g, h, -7 * h], [g, 1e-4 * h, -h]])
        batch = jnp.array(batch, jnp.float32)
        for tau in (1e-3, 0.02, 1.0):
            update = first_pcd(batch, tau)
            np.testing.assert_allclose(update, batch[:, 0], rtol=1e-5)
        # Almost opposite, but not quite.
        matrix = np.array([g, h, -h + 0.03 * e])
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        expected = closest(unit[0], unit[1:], np.full(2, 0.02))
        expected *= np.linalg.norm(g) / np.linalg.norm(expected)
        update = first_pcd(batch.at[0].set(jnp.array(matrix)), 0.02)[0]
        np.testing.assert_allclose(update, expected, rtol=1e-2, atol=1e-2)

    def test_many_tasks_in_few_dimensions(self):
        batch = jnp.array(np.random.default_rng(3).normal(size=(5, 12, 3)), jnp.float32)
        update = first_pcd(batch, 0.02)
        np.testing.assert_allclose(update, batch[:, 0], rtol=1e-4)  # Not feasible.

    def test_without_a_primary_gradient_is_zero(self):
        update, state = apply(optax_mtl.pcd(3), J3 * np.array([[0], [1], [1]]), steps=2)
        np.testing.assert_array_equal(update, np.zeros(4))
        assert state.counts.tolist() == [0, 2, 2]

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match=r"tau is .* should be in \[0, 1\]"):
            optax_mtl.pcd(2, tau=1.5)


@pytest.mark.parametrize(
    "name", ["bloop", "cosine_gating", "dynamic_barrier", "metabalance", "pcd"]
)
@pytest.mark.parametrize("primary", [-1, 3])
def test_primary_task_exists(name, primary):
    with pytest.raises(ValueError, match=f"primary={primary} .* from 0"):
        apply(optax_mtl.get(name, 3, primary=primary), J3)


@pytest.mark.parametrize(
    "make",
    [
        optax_mtl.cosine_gating,
        functools.partial(optax_mtl.cosine_gating, weighted=False),
        optax_mtl.dynamic_barrier,
        functools.partial(optax_mtl.priority_projection, mode="cone"),
        functools.partial(optax_mtl.priority_projection, mode="always"),
    ],
)
def test_never_conflicts_with_the_primary_task(make, x64):
    batch = np.concatenate([REGULAR, matrices("any")[:6]])
    update = batched(make())(batch)
    dots = np.einsum("np,np->n", update, batch[:, 0])
    assert np.all(dots >= -1e-9 * np.sum(batch[:, 0] ** 2, axis=1))
