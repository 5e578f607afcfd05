"""Methods that look for the point of the Pareto front that a preference asks for.

Expected values are a second derivation in NumPy, with quadratic and linear programs of
quadprog and SciPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog
import scipy.optimize

import optax_mtl

RNG = np.random.default_rng(0)
GRADIENTS = RNG.normal(size=(12, 4, 6)) * np.exp(RNG.normal(size=(12, 4, 1)))
LOSSES = np.exp(1.5 * RNG.normal(size=(12, 4)))
LOSSES[0] = [5, 0.1, 0.1, 0.1]


def steps(method, gradients=GRADIENTS, losses=LOSSES, double=True, **extra):
    """Updates of a method in a row of steps."""
    with jax.enable_x64(double):
        cast = lambda x: jnp.asarray(x, float)
        extra = {name: cast(value) for name, value in extra.items()}

        @jax.jit
        def scan(gradients, losses, extra):
            def step(state, given):
                gradients, losses, extra = given
                return method.update(gradients, state, losses=losses, **extra)[::-1]

            state = method.init(gradients[0, 0])
            return jax.lax.scan(step, state, (gradients, losses, extra))[1]

        return np.asarray(scan(cast(gradients), cast(losses), extra))


def shortest(rows):
    """The point of least norm in the hull of some vectors."""
    gram, count = rows @ rows.T, len(rows)
    regular = gram + 1e-12 * np.trace(gram) * np.eye(count)
    constraints = np.column_stack([np.ones(count), np.eye(count)])
    bounds = np.append(1.0, np.zeros(count))
    found = quadprog.solve_qp(regular, np.zeros(count), constraints, bounds, 1)[0]
    # Without regularisation, on the face that it found.
    face = rows[found > 1e-7]
    step = face[1:] - face[0]
    return face[0] - np.linalg.lstsq(step.T, face[0])[0] @ step


def pareto_mtl(gradients, losses, own, others, started=False):
    """Directions of the authors' two functions, one after the other."""
    unit = lambda v: v / np.linalg.norm(v)
    directions = []
    for g, loss in zip(gradients, losses):
        w = np.stack([unit(u) - unit(own) for u in others])
        active = w[w @ unit(loss) > 1e-12]
        started = started or not len(active)
        directions.append(
            shortest(np.vstack([g, active @ g] if started else [active @ g]))
        )
    return np.stack(directions), started


PREFERENCES = [
    (None, None),
    ([1.0, 2, 3, 4], None),
    ([1.0, 1, 2, 0], RNG.random((4, 7))),
]


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("preference, others", PREFERENCES)
def test_pareto_mtl_like_numpy(preference, others, double):
    own = np.ones(4) if preference is None else preference
    rest = np.eye(4) if others is None else others.T
    method = optax_mtl.pareto_mtl(preference=preference, others=others)
    found = steps(method, double=double)
    expected, started = pareto_mtl(GRADIENTS, LOSSES, own, rest)
    assert started  # And not at once, so that both phases are there.
    assert not pareto_mtl(GRADIENTS[:1], LOSSES[:1], own, rest)[1]
    sizes = np.linalg.norm(GRADIENTS, axis=2).max(axis=1)[:, None]
    tolerance = 1e-9 if double else 1e-5
    np.testing.assert_allclose(found / sizes, expected / sizes, atol=tolerance)


def test_pareto_mtl_of_losses_of_either_sign():
    losses = RNG.normal(size=(12, 4))
    expected, _ = pareto_mtl(GRADIENTS, losses, np.ones(4), np.eye(4))
    found = steps(optax_mtl.pareto_mtl(), losses=losses)
    sizes = np.linalg.norm(GRADIENTS, axis=2).max(axis=1)[:, None]
    np.testing.assert_allclose(found / sizes, expected / sizes, atol=1e-9)


def test_pareto_mtl_finds_its_cell_of_the_front():
    """The synthetic problem of the paper: two losses, five preferences."""
    size = 20
    shift = 1 / np.sqrt(size)
    losses_fn = lambda x: jnp.stack(
        [
            1 - jnp.exp(-jnp.sum((x - shift) ** 2)),
            1 - jnp.exp(-jnp.sum((x + shift) ** 2)),
        ]
    )
    angles = np.linspace(0, np.pi / 2, 5)
    rays = np.stack([np.cos(angles), np.sin(angles)])
    for number in (1, 2, 3):
        method = optax_mtl.pareto_mtl(preference=rays[:, number], others=rays)
        resolve = optax_mtl.value_and_grad(losses_fn, method)

        @jax.jit
        def run(x, resolve=resolve):
            def step(carry, _):
                losses, grads, state = resolve(*carry)
                return (carry[0] - grads, state), losses

            return jax.lax.scan(step, (x, resolve.init(x)), length=200)[1][-1]

        start = np.linspace(-0.3, 0.5, size).astype(np.float32)
        found = np.asarray(run(jnp.asarray(start)))
        cosines = found @ rays / np.linalg.norm(found)
        assert np.argmax(cosines) == number
        # On the front, x is a multiple of one vector, between the two optima.
        first = 1 - np.exp(-((np.sqrt(-np.log(1 - found[1])) - 2) ** 2))
        np.testing.assert_allclose(found[0], first, atol=5e-3)


def test_pareto_mtl_with_a_preference_among_the_others():
    """The same ray twice is no constraint, whatever the rounding errors."""
    ray = np.array([0.3, 0.7, 0.2, 0.9])
    others = np.stack([3 * ray, [1, 0, 0, 0], [0, 1, 0, 0]], axis=1)
    found = steps(optax_mtl.pareto_mtl(preference=ray, others=others), double=False)
    without = optax_mtl.pareto_mtl(preference=ray, others=others[:, 1:])
    np.testing.assert_allclose(found, steps(without, double=False), atol=1e-5)


def test_pareto_mtl_refuses_other_shapes():
    method = optax_mtl.pareto_mtl(others=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"others has shape \(3, 2\).*\(2, K\)"):
        method.update(jnp.eye(2), method.init(None), losses=jnp.ones(2))


def maximize(objective, rows, bounds):
    """A linear program on the simplex: its solution, or None."""
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = scipy.optimize.linprog(
        -objective, -rows, -bounds, [[1] * len(objective)], [1], options=tight
    )
    return found.x if found.status == 0 else None


def epo(gradients, losses, r):
    """The weights of the authors' code, and the kind of step."""
    gram = gradients @ gradients.T
    gram = gram / np.trace(gram)
    shares = r * losses / np.sum(r * losses)
    logs = np.log(shares * len(r))
    distance = shares @ logs
    towards = gram @ (r * (logs - distance))
    if distance > 1e-4:
        helped, bounds = towards > 0, 0 * towards
        keep = np.ones(len(r), bool)
        if helped.any():
            most = np.argmax(shares)
            bounds = np.where(np.arange(len(r)) == most, 0, towards)
            keep = ~helped | (np.arange(len(r)) == most)
        return maximize(towards, gram[keep], bounds[keep]), f"balance {helped.any()}"
    bound = min(0, towards.max())
    rows = np.vstack([gram, towards])
    found = maximize(gram.sum(axis=0), rows, np.append(0 * r, bound))
    if found is not None:
        return found, "descend"
    # Ours: with the best that is possible in its place.
    best = maximize(towards, gram, 0 * r) @ towards
    slack = 1e-9 * np.abs(towards).max()
    return maximize(gram.sum(axis=0), rows, np.append(0 * r, best - slack)), "ours"


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_epo_like_the_authors(double):
    r = np.array([1.0, 2, 0.5, 1])
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(120, 4, 6)) * np.exp(rng.normal(size=(120, 4, 1)))
    gradients += gradients[:, :1]
    spread = np.repeat([1.5, 1e-2], 60)[:, None]  # Beside the ray, and on it.
    losses = 1 / r * np.exp(spread * rng.normal(size=(120, 4)))
    found = steps(optax_mtl.epo(preference=r), gradients, losses, double)
    kinds = set()
    for g, loss, update in zip(gradients, losses, found):
        weights, kind = epo(g, loss, r)
        kinds.add(kind)
        size = np.linalg.norm(g, axis=1).max()
        tolerance = 1e-7 if kind == "ours" else 1e-9
        if not double:  # On the ray, float32 keeps five digits of how far off it is.
            tolerance = 1e-5 if kind.startswith("balance") else 1e-4
        np.testing.assert_allclose(update / size, weights @ g / size, atol=tolerance)
    assert kinds == {"balance True", "balance False", "descend", "ours"}


def test_epo_ends_on_its_ray():
    """The synthetic problem of the paper, whose front is not convex."""
    size = 20
    shift = 1 / np.sqrt(size)
    losses_fn = lambda x: jnp.stack(
        [1 - jnp.exp(-jnp.sum((x - s) ** 2)) for s in (shift, -shift)]
    )

    @jax.jit
    @jax.vmap
    def run(r):
        resolve = optax_mtl.value_and_grad(losses_fn, optax_mtl.epo(preference=r))

        def step(carry, _):
            x, state = carry
            losses, grads, state = resolve(x, state)
            return (x - 0.05 * grads, state), losses

        x = jnp.linspace(-0.3, 0.5, size)
        return jax.lax.scan(step, (x, resolve.init(x)), length=400)[1][-1]

    preferences = np.array([[0.9, 0.44], [1, 1], [0.44, 0.9]])
    found = np.asarray(run(jnp.asarray(preferences)))
    scaled = preferences * found
    np.testing.assert_allclose(scaled[:, 0], scaled[:, 1], rtol=5e-2)
    front = 1 - np.exp(-((np.sqrt(-np.log(1 - found[:, 1])) - 2) ** 2))
    np.testing.assert_allclose(found[:, 0], front, atol=1e-2)


@pytest.mark.parametrize("num_tasks", [1, 2, 40])
def test_epo_of_few_and_of_many(num_tasks):
    gradients = RNG.normal(size=(3, num_tasks, 64)).astype(np.float32)
    losses = np.exp(RNG.normal(size=(3, num_tasks)))
    found = steps(optax_mtl.epo(), gradients, losses, double=False)
    assert np.isfinite(found).all() and np.abs(found).max(axis=1).min() > 0


def project_simplex(v):
    descending = np.sort(v)[::-1]
    thresholds = (descending.cumsum() - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - thresholds[np.flatnonzero(descending > thresholds)[-1]], 0)


def ferero(first, second, losses, gamma, complement):
    """Directions of the single loop, for given rows that span the complement."""
    count = first.shape[1]
    of_losses, of_constraint = np.full(count, 1 / count), np.zeros(len(complement))
    directions = []
    for g1, g2, loss in zip(first, second, losses):
        total = of_losses + complement.T @ of_constraint
        slope = g1 @ g2.T @ total / np.abs(total).sum()
        of_losses = project_simplex(of_losses - gamma * slope)
        of_constraint = of_constraint - gamma * complement @ (slope - 0.5 * loss)
        total = of_losses + complement.T @ of_constraint
        directions.append(total / np.abs(total).sum() @ (g1 + g2) / 2)
    return np.stack(directions)


@pytest.mark.parametrize("num_tasks", [2, 4])
@pytest.mark.parametrize("two", [False, True], ids=["one batch", "two batches"])
def test_ferero_like_numpy(num_tasks, two):
    """The authors' row for two tasks, and an orthonormal basis for more."""
    r, rows = np.array([3.0, 4]), np.array([[0.8, -0.6]])
    if num_tasks > 2:
        r = np.array([3.0, 1, 2, 2])
        rows = np.linalg.svd(r[None])[2][1:]
    first = GRADIENTS[:, :num_tasks]
    second = first + 0.5 * RNG.normal(size=first.shape) if two else first
    losses = LOSSES[:, :num_tasks] * np.tile([[1], [-1]], (6, 1))  # Of either sign.
    extra = {"second_updates": second} if two else {}
    method = optax_mtl.ferero(num_tasks, preference=r, gamma=0.02)
    found = steps(method, first, losses, **extra)
    expected = ferero(first, second, losses, 0.02, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(found - first.mean(axis=1)).max() > 0.1


def test_ferero_ends_on_its_ray():
    losses_fn = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)])
    method = optax_mtl.ferero(2, preference=[1.0, 2.0], gamma=0.03)
    resolve = optax_mtl.value_and_grad(losses_fn, method)

    @jax.jit
    def run(x):
        def step(carry, _):
            losses, grads, state = resolve(*carry)
            return (carry[0] - 0.05 * grads, state), losses

        return jax.lax.scan(step, (x, resolve.init(x)), length=3000)[1][-1]

    found = np.asarray(run(jnp.array([-0.7, 0.3])))
    np.testing.assert_allclose(found[1] / found[0], 2, rtol=1e-2)
    np.testing.assert_allclose(np.sqrt(found).sum(), np.sqrt(8), rtol=1e-3)
