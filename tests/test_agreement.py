"""Soft gates by energy, and steps scaled by the agreement of the tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl.agreement import mean_cosine

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4), "s": jnp.zeros([])}
ORTHOGONAL = jnp.array([[1.0, 0], [0, 2]])
EQUAL = jnp.array([[1.0, 2], [1, 2]])
OPPOSED = jnp.array([[1.0, 0], [-1, 0]])


def draw(rng, num_tasks=2):
    return jax.tree.map(
        lambda p: jnp.array(rng.normal(size=(num_tasks, *p.shape))), PARAMS
    )


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


class TestEnergyGate:
    @pytest.mark.parametrize("granularity", ["element", "channel", "tensor"])
    def test_is_a_sigmoid_of_the_energies_of_two_tasks(self, granularity, x64):
        """Against loops over groups, written from the definition.

        The sigmoid of log(E_1 / E_2) / temperature is the share of E_1^(1/temperature).
        """
        temperature, boost, q, r = 0.7, [1.0, 3.0], 1.5, 0.5
        method = optax_mtl.energy_gate(
            2,
            granularity=granularity,
            temperature=temperature,
            boost=boost,
            magnitude=q,
            alignment=r,
        )
        update_fn, state = jax.jit(method.update), method.init(PARAMS)
        average = {k: np.zeros(p.shape) for k, p in PARAMS.items()}
        usual = {k: np.zeros(2) for k in PARAMS}
        rng = np.random.default_rng(0)
        for step in range(1, 4):
            updates = draw(rng)
            update, state = update_fn(updates, state)
            for k, p in PARAMS.items():
                groups = np.arange(p.size)
                if granularity == "channel" and p.ndim:
                    groups = groups % p.shape[-1]
                elif granularity == "tensor":
                    groups = np.zeros(p.size, int)
                g, u = np.reshape(updates[k], (2, -1)), np.ravel(average[k])
                energies = np.zeros((2, groups.max() + 1))
                for i, group in np.ndindex(energies.shape):
                    x, y = g[i, groups == group], u[groups == group]
                    size = np.linalg.norm(x) * np.linalg.norm(y)
                    cosine = np.round(x @ y / size, 12) if size else 0
                    aligned = (1 + cosine) / 2
                    energies[i, group] = np.mean(x**2) ** q * aligned**r
                usual[k] = 0.99 * usual[k] + 0.01 * energies.mean(axis=1)
                relative = energies / (usual[k] / (1 - 0.99**step))[:, None]
                shares = (np.array(boost)[:, None] * relative) ** (1 / temperature)
                total = shares.sum(axis=0)
                share = np.where(
                    total > 0, shares[0] / np.where(total > 0, total, 1), 0.5
                )
                gate = 2 * share[groups]
                expected = (gate * g[0] + (2 - gate) * g[1]).reshape(p.shape)
                np.testing.assert_allclose(update[k], expected, rtol=1e-6, atol=1e-9)
                average[k] = 0.9 * average[k] + 0.1 * expected

    def test_high_temperature_gives_the_plain_sum(self):
        method = optax_mtl.energy_gate(2, temperature=1e9)
        update_fn, state = jax.jit(method.update), method.init(PARAMS)
        rng = np.random.default_rng(1)
        for _ in range(2):
            updates = draw(rng)
            update, state = update_fn(updates, state)
        for k, g in updates.items():
            np.testing.assert_allclose(update[k], g.sum(axis=0), rtol=1e-5, atol=1e-6)

    def test_tensor_of_one_task_is_not_gated(self):
        updates = draw(np.random.default_rng(2))
        updates["b"] = updates["b"].at[0].set(0)
        method = optax_mtl.energy_gate(2)
        update, state = jax.jit(method.update)(updates, method.init(PARAMS))
        np.testing.assert_allclose(update["b"], updates["b"][1], rtol=1e-6)
        assert state.counts["b"].tolist() == [0, 1]

    def test_scale_of_a_loss_is_forgotten(self):
        updates = draw(np.random.default_rng(3))
        method = optax_mtl.energy_gate(2)
        gates = lambda s: jax.jit(method.update)(
            {k: jnp.stack([s * g[0], 0 * g[1] + 1e-12]) for k, g in updates.items()},
            method.init(PARAMS),
        )[0]
        expected = jax.tree.map(lambda x: 1e3 * x, gates(1.0))
        for k, actual in gates(1e3).items():
            np.testing.assert_allclose(actual, expected[k], rtol=1e-4)

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="'element', 'channel' or 'tensor'"):
            optax_mtl.energy_gate(2, granularity="row")


def factors(tx, batches):
    """The factors after each of some batches."""
    update_fn, state = jax.jit(tx.update), tx.init(jnp.zeros(2))
    out = []
    for updates in batches:
        _, state = update_fn(updates, state)
        out.append(float(state.factor))
    return out


class TestScaleByAgreement:
    def wrap(self, **options):
        inner = optax.chain(optax_mtl.linear(), optax.sgd(1.0))
        return optax_mtl.scale_by_agreement(inner, **options)

    def test_factor_is_one_where_the_tasks_agree(self):
        for measure in ("alignment", "cosine"):
            tx = self.wrap(measure=measure)
            np.testing.assert_allclose(factors(tx, [EQUAL] * 3), 1, rtol=1e-6)

    def test_factor_is_the_floor_where_they_oppose_each_other(self):
        for measure in ("alignment", "cosine"):
            tx = self.wrap(measure=measure, floor=0.2)
            np.testing.assert_allclose(factors(tx, [OPPOSED] * 2), 0.2, rtol=1e-6)

    def test_is_a_power_of_the_smoothed_agreement(self):
        tx = self.wrap(power=2.0, floor=0.1, smoothing=0.5)
        alignment = np.sqrt(5) / 3  # Of (1, 0) and (0, 2).
        smoothed = [1, (0.5 * alignment + 0.25 * 1) / 0.75]  # Bias correction.
        expected = 0.1 + 0.9 * np.square(smoothed)
        np.testing.assert_allclose(
            factors(tx, [EQUAL, ORTHOGONAL]), expected, rtol=1e-6
        )

    def test_steps_of_the_tutorials(self):
        tx = self.wrap(
            measure="cosine", rule="steps", smoothing=0.0, threshold=0.9, floor=0.2
        )
        batches = [OPPOSED, ORTHOGONAL, OPPOSED, EQUAL, EQUAL]
        expected = [0.5, 0.25, 0.2, 0.21, 0.2205]
        np.testing.assert_allclose(factors(tx, batches), expected, rtol=1e-6)
        np.testing.assert_allclose(factors(tx, [EQUAL] * 3), 1)

    def test_scales_what_adam_would_undo(self):
        adam = optax.chain(optax_mtl.linear(), optax.adam(1e-2))
        tx = optax_mtl.scale_by_agreement(adam)
        update, plain_update = jax.jit(tx.update), jax.jit(adam.update)
        state, plain_state = tx.init(jnp.zeros(2)), adam.init(jnp.zeros(2))
        for updates in (EQUAL, ORTHOGONAL):
            actual, state = update(updates, state)
            plain, plain_state = plain_update(updates, plain_state)
            np.testing.assert_allclose(actual, state.factor * plain, rtol=1e-6)
        assert 0 < optax.tree.get(state, "factor") < 1

    def test_what_cannot_be_measured_changes_nothing(self):
        tx = self.wrap()
        _, state = tx.update(ORTHOGONAL, tx.init(jnp.zeros(2)))
        for updates in (jnp.zeros((2, 2)), jnp.full((2, 2), jnp.nan)):
            update, after = tx.update(updates, state)
            np.testing.assert_array_equal(update, -updates.sum(axis=0))
            np.testing.assert_array_equal(jnp.array(after[1:]), jnp.array(state[1:]))

    def test_passes_extra_arguments_and_dtypes(self):
        inner = optax.chain(optax_mtl.dwa(2), optax.sgd(1.0))
        tx = optax_mtl.scale_by_agreement(inner)
        params = jnp.zeros(2, jnp.bfloat16)
        step = lambda g: tx.update(g, tx.init(params), losses=jnp.ones(2))[0]
        update = jax.eval_shape(step, ORTHOGONAL.astype(jnp.bfloat16))
        assert update.dtype == jnp.bfloat16

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="'alignment' or 'cosine'"):
            self.wrap(measure="angle")
        with pytest.raises(ValueError, match="'power' or 'steps'"):
            self.wrap(rule="step")


def test_mean_cosine_is_one_of_present_pairs():
    matrix = jnp.array([[1.0, 0], [1, 1], [0, 0], [0, -1]])
    expected = (np.sqrt(0.5) + 0 - np.sqrt(0.5)) / 3
    measure = jax.jit(lambda matrix: mean_cosine(optax_mtl.gram(matrix)))
    np.testing.assert_allclose(measure(matrix), expected, atol=1e-6)
    assert measure(matrix[:1]) == 1
