"""EAGC: golden values, equality of the two exact forms, devices, bad input.

Golden values were produced in float64 by the authors' own functions (EAGC,
commit 87af6ff); where that is not so, a second derivation in NumPy stands here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optax_mtl.methods.conflict import eagc as lib


def wave(rows, columns, offset=0.0, frequency=1.0):
    steps = jnp.arange(1, rows * columns + 1, dtype=float).reshape(rows, columns)
    return jnp.sin(offset + frequency * steps)


FEATURES = functools.partial(wave, 4, 3)
CONCEPTOR = [
    [0.31890002, 0.36544412, 0.07600059],
    [0.36544412, 0.52381110, 0.20058857],
    [0.07600059, 0.20058857, 0.14075635],
]
WEIGHT = [0, 0.38700627, 0, 0.36794812]
COORDINATED = [
    [0.99914139, 0.58964278, -0.36197068],
    [-0.76343024, -0.44096276, 0.28692385],
    [0.94280803, 0.79214020, -0.08681767],
    [-0.65690157, -0.58353883, 0.02632682],
]
LABELLED = np.array([True, False, True, False])


@pytest.fixture(params=["float32", "float64"])
def rtol(request):
    """Relative tolerance of golden values with eight decimals, per precision."""
    with jax.enable_x64(request.param == "float64"):
        yield {"float32": 1e-5, "float64": 1e-7}[request.param]


def close(actual, desired, rtol):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=rtol / 10)


def golden_gradient(labelled=LABELLED, loss_scale=1.0):
    """The appendix's batch: cotangent in, coordinated cotangent and state out."""
    z = jnp.cos(jnp.arange(1, 13, dtype=float)).reshape(4, 3)
    conceptor = lib.fit_conceptor(FEATURES())
    state = lib.EAGCState(jnp.array(0.6))
    cotangent = loss_scale * FEATURES(0.5)

    def loss(z):
        weight, new_state = lib.eagc_weights(z, labelled, conceptor, state)
        z = lib.coordinate(
            z,
            conceptor=conceptor,
            weight=weight,
            reference=jax.lax.stop_gradient(z) - 0.1 * FEATURES(2.0),
            labelled=labelled,
            loss_scale=loss_scale,
        )
        return (z * cotangent).sum(), (weight, new_state)

    gradient, (weight, state) = jax.grad(loss, has_aux=True)(z)
    return gradient, weight, state


def test_golden_conceptor(rtol):
    conceptor = lib.fit_conceptor(FEATURES())
    close(conceptor, CONCEPTOR, max(rtol, 3e-7))
    values = np.linalg.eigvalsh(conceptor)
    np.testing.assert_allclose(values, [0, 0.12335482, 0.86011265], atol=1e-6)
    assert (conceptor == conceptor.T).all()


def test_golden_energy(rtol):
    z = jnp.cos(jnp.arange(1, 13, dtype=float)).reshape(4, 3)
    energy = lib.energy_ratio(z, lib.fit_conceptor(FEATURES()))
    close(energy, [0.16703533, 0.13046431, 0.12523277, 0.15246913], rtol)


def test_golden_gate_and_gradient(rtol):
    gradient, weight, state = golden_gradient()
    close(state.labelled_energy, 0.5773067026, rtol)
    close(weight, WEIGHT, rtol)
    close(gradient, COORDINATED, rtol)
    ungated, _ = lib.eagc_weights(
        jnp.cos(jnp.arange(1, 13, dtype=float)).reshape(4, 3),
        jnp.zeros(4),
        lib.fit_conceptor(FEATURES()),
        state,
        strength=1.0,
    )
    close(ungated, [0.71066498, 0.77401253, 0.78307448, 0.73589624], rtol)


def test_conceptor_is_the_formula_of_the_paper():
    with jax.enable_x64(True):
        z = np.random.default_rng(0).normal(size=(50, 6)) * [1, 2, 0.1, 3, 0, 1]
        r = z.T @ z / 50
        expected = r @ np.linalg.inv(r + np.eye(6) / 9)
        close(lib.fit_conceptor(jnp.array(z), 3.0), expected, 1e-12)
        streamed = lib.fit_conceptor(aperture=3.0, second_moment=jnp.array(r))
        close(streamed, expected, 1e-12)


def test_aperture_limits_and_scale():
    z = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert (lib.fit_conceptor(z, 0.0) == 0).all()
    close(lib.fit_conceptor(z, 1e4), np.diag([1.0, 1.0, 0.0]), 1e-5)
    close(
        lib.fit_conceptor(1e-3 * z, relative=True),
        lib.fit_conceptor(1e3 * z, relative=True),
        1e-5,
    )
    assert (lib.fit_conceptor(0 * z, relative=True) == 0).all()


def trunk(params, inputs):
    hidden = jnp.tanh(inputs @ params["first"])
    return jnp.tanh(hidden @ params["second"])


def discovery_problem(n=16, width=5):
    """A nonlinear trunk, a loss on its features, and all that EAGC needs."""
    rng = np.random.default_rng(1)
    params = {
        "first": jnp.array(rng.normal(size=(7, 9))),
        "second": jnp.array(rng.normal(size=(9, width))),
    }
    return {
        "params": params,
        "inputs": jnp.array(rng.normal(size=(n, 7))),
        "labelled": jnp.array(np.arange(n) % 3 == 0),
        "reference": jnp.array(rng.normal(size=(n, width))),
        "conceptor": lib.fit_conceptor(jnp.array(rng.normal(size=(20, width)))),
        "state": lib.EAGCState(jnp.array(0.9, float)),
        "target": jnp.array(rng.normal(size=(n, width))),
    }


def head_loss(z, target):
    # Not quadratic, and mixes rows as contrastive losses do.
    return jnp.mean((z - target) ** 4) + jnp.mean(jax.nn.logsumexp(z @ z.T, 1))


def gradient_at_features(problem, strength=0.5, anchor=0.7):
    conceptor, labelled = problem["conceptor"], problem["labelled"]

    def loss(params):
        z = trunk(params, problem["inputs"])
        weight, _ = lib.eagc_weights(
            z, labelled, conceptor, problem["state"], strength=strength
        )
        z = lib.coordinate(
            z,
            conceptor=conceptor,
            weight=weight,
            reference=problem["reference"],
            labelled=labelled,
            anchor=anchor,
        )
        return head_loss(z, problem["target"])

    return jax.grad(loss)(problem["params"])


def gradient_from_pull_backs(problem, strength=0.5, anchor=0.7, loss_scale=1.0):
    z, pull_back = jax.vjp(
        lambda params: trunk(params, problem["inputs"]), problem["params"]
    )
    cotangent = loss_scale * jax.grad(head_loss)(z, problem["target"])
    updates, state = lib.eagc_pull_backs(
        pull_back,
        z,
        cotangent,
        conceptor=problem["conceptor"],
        reference=problem["reference"],
        labelled=problem["labelled"],
        state=problem["state"],
        loss_scale=loss_scale,
    )
    method = lib.eagc(strength, anchor)
    update, _ = method.update(updates, method.init(problem["params"]))
    return update, updates, state


@pytest.mark.parametrize("strength, anchor", [(0.5, 0.7), (0, 0.7), (3.0, 0), (0, 0)])
def test_two_exact_forms_agree(strength, anchor):
    with jax.enable_x64(True):
        problem = discovery_problem()
        expected = gradient_at_features(problem, strength, anchor)
        actual, updates, _ = gradient_from_pull_backs(problem, strength, anchor)
        assert float(jnp.abs(updates[next(iter(updates))][2]).max()) > 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-10, atol=1e-12)


def test_alignment_is_the_gradient_of_a_loss():
    with jax.enable_x64(True):
        problem = discovery_problem()

        def loss(params):
            z = trunk(params, problem["inputs"])
            error = ((z - problem["reference"]) ** 2).mean(1)
            labelled = problem["labelled"]
            mean_error = (labelled * error).sum() / labelled.sum()
            return head_loss(z, problem["target"]) + 0.7 / 2 * mean_error

        expected = jax.grad(loss)(problem["params"])
        actual = gradient_at_features(problem, strength=0.0)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-10, atol=1e-12)


def test_pull_backs_are_the_parts_of_the_gradient():
    with jax.enable_x64(True):
        problem = discovery_problem()
        _, updates, state = gradient_from_pull_backs(problem)
        total = gradient_at_features(problem, 0.0, 0.0)
    for name, value in total.items():
        np.testing.assert_allclose(updates[name][0] + updates[name][1], value, 1e-10)
    assert state.labelled_energy != problem["state"].labelled_energy


def test_loss_scale_divides_out():
    gradient, _, _ = golden_gradient()
    scaled, _, _ = golden_gradient(loss_scale=1024.0)
    np.testing.assert_allclose(scaled / 1024, gradient, rtol=1e-6)
    problem = discovery_problem()
    expected, _, _ = gradient_from_pull_backs(problem)
    actual, _, _ = gradient_from_pull_backs(problem, loss_scale=1024.0)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name] / 1024, value, rtol=1e-5, atol=1e-7)


def test_batches_without_labelled_or_unlabelled_rows():
    gradient, weight, state = golden_gradient(np.zeros(4, bool))
    assert state.labelled_energy == np.float32(0.6)
    assert (weight > 0).all() and jnp.isfinite(gradient).all()
    gradient, weight, _ = golden_gradient(np.ones(4, bool))
    assert (weight == 0).all()
    pull = 0.7 / (4 * 3) * 0.1 * FEATURES(2.0)
    np.testing.assert_allclose(gradient, FEATURES(0.5) + pull, rtol=1e-5, atol=1e-7)


def test_zero_rows_are_novel():
    conceptor = lib.fit_conceptor(FEATURES())
    assert (lib.energy_ratio(jnp.zeros((2, 3)), conceptor) == 0).all()
    weight, _ = lib.eagc_weights(
        jnp.zeros((2, 3)), np.zeros(2), conceptor, lib.EAGCState(jnp.array(0.5))
    )
    np.testing.assert_array_equal(weight, [0.5, 0.5])


def test_energy_ignores_scale_and_stays_within_bounds():
    conceptor = lib.fit_conceptor(FEATURES())
    z = FEATURES(0.3)
    expected = lib.energy_ratio(z, conceptor)
    for scale in 1e-12, 1e12:
        actual = lib.energy_ratio(scale * z, conceptor)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert (lib.energy_ratio(z, 2 * jnp.eye(3)) == 1).all()


def test_nan_features_reach_the_gradient_but_not_the_state():
    z = FEATURES().at[0, 0].set(jnp.nan)  # Row 0 is labelled.
    conceptor = lib.fit_conceptor(FEATURES(1.0))
    weight, state = lib.eagc_weights(
        z, LABELLED, conceptor, lib.EAGCState(jnp.array(0.6))
    )
    assert state.labelled_energy == np.float32(0.6)
    assert jnp.isnan(weight[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_dtypes(dtype):
    problem = discovery_problem()
    z = problem["reference"].astype(dtype)
    state = lib.EAGCState(jnp.array(0.6, jnp.float32))
    labelled, conceptor = problem["labelled"], problem["conceptor"]

    @jax.grad
    def gradient(z):
        weight, new_state = lib.eagc_weights(z, labelled, conceptor, state)
        assert new_state.labelled_energy.dtype == jnp.float32
        z = lib.coordinate(
            z,
            conceptor=conceptor,
            weight=weight,
            reference=z + 1,
            labelled=labelled,
        )
        return z.sum()

    assert gradient(z).dtype == dtype
    np.testing.assert_allclose(
        gradient(z).astype(jnp.float32), gradient(z.astype(jnp.float32)), atol=0.03
    )


def test_nothing_but_the_features_gets_a_gradient():
    problem = discovery_problem()
    z, conceptor, state = problem["target"], problem["conceptor"], problem["state"]

    def loss(conceptor, energy, reference):
        state = lib.EAGCState(energy)
        weight, _ = lib.eagc_weights(z, problem["labelled"], conceptor, state)
        coordinated = lib.coordinate(
            z,
            conceptor=conceptor,
            weight=weight,
            reference=reference,
            labelled=problem["labelled"],
        )
        return (coordinated**2).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))(conceptor, state[0], z + 1)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("form", ["features", "pull-backs"])
def test_data_parallel_equals_one_device(form):
    problem = discovery_problem(n=24)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = {
        name: problem[name] for name in ("inputs", "labelled", "reference", "target")
    }
    # The devices hold different numbers of labelled rows: 3, 2, 0 and 0.
    batch["labelled"] = jnp.array(np.isin(np.arange(24), [0, 1, 3, 6, 8]))
    state, conceptor = problem["state"], problem["conceptor"]

    def gradient(params, state, batch, axis_name=None):
        labelled, reference = batch["labelled"], batch["reference"]
        options = {"conceptor": conceptor, "axis_name": axis_name}
        row_loss = lambda z: jnp.mean((z - batch["target"]) ** 2)

        if form == "pull-backs":
            z, pull_back = jax.vjp(lambda p: trunk(p, batch["inputs"]), params)
            updates, state = lib.eagc_pull_backs(
                pull_back,
                z,
                jax.grad(row_loss)(z),
                reference=reference,
                labelled=labelled,
                state=state,
                **options,
            )
            if axis_name is not None:
                updates = jax.lax.pmean(updates, axis_name)
            return lib.eagc().update(updates, optax.EmptyState())[0], state

        def loss(params):
            z = trunk(params, batch["inputs"])
            weight, new_state = lib.eagc_weights(z, labelled, state=state, **options)
            z = lib.coordinate(
                z, weight=weight, reference=reference, labelled=labelled, **options
            )
            return row_loss(z), new_state

        gradients, new_state = jax.grad(loss, has_aux=True)(params)
        if axis_name is not None:
            gradients = jax.lax.pmean(gradients, axis_name)
        return gradients, new_state

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
    )
    def on_devices(params, state, batch):
        params = jax.lax.pcast(params, "data", to="varying")
        return gradient(params, state, batch, "data")

    expected = jax.jit(gradient)(problem["params"], state, batch)
    actual = jax.jit(on_devices)(problem["params"], state, batch)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7),
        actual,
        expected,
    )


def test_one_compilation_and_stable_state():
    problem = discovery_problem()
    step = jax.jit(
        lambda z, state: lib.eagc_weights(
            z, problem["labelled"], problem["conceptor"], state
        )[1]
    )
    state = problem["state"]
    for _ in range(3):
        state = step(problem["target"], state)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z, m: lib.fit_conceptor(z[:0]), "labelled sample"),
        (lambda z, m: lib.fit_conceptor(z.at[0, 0].set(jnp.nan)), "features.*NaN"),
        (lambda z, m: lib.fit_conceptor(), "either features or second_moment"),
        (lambda z, m: lib.fit_conceptor(second_moment=z), "second_moment is"),
        (lambda z, m: lib.energy_ratio(z, jnp.eye(4)), "conceptor has the shape"),
        (
            lambda z, m: lib.eagc_weights(z, m[:3], jnp.eye(3), lib.EAGCState(m[0])),
            "labelled has the shape",
        ),
        (
            lambda z, m: lib.coordinate(
                z, conceptor=jnp.eye(3), weight=m, reference=z[:2], labelled=m
            ),
            "reference is",
        ),
        (
            lambda z, m: lib.eagc_pull_backs(
                lambda c: (c,),
                z,
                z[:2],
                conceptor=jnp.eye(3),
                reference=z,
                labelled=m,
                state=lib.EAGCState(m[0]),
            ),
            "cotangent is",
        ),
        (
            lambda z, m: lib.coordinate(
                z, conceptor=jnp.eye(2), weight=m, reference=z, labelled=m
            ),
            "conceptor has the shape",
        ),
        (
            lambda z, m: lib.coordinate(
                z, conceptor=jnp.eye(3), weight=m[:1], reference=z, labelled=m
            ),
            "weight has the shape",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(FEATURES(), jnp.ones(4))
