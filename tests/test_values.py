"""Values and laws of the methods from elsewhere: papers, other code, other solvers.

One row a value. "NumPy" stands for values that were computed from the definition with
NumPy in float64, "TorchJD" for values of its own tests or runs, version 0.17 or 0.18.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadprog
import scipy.optimize

import optax_mtl
from optax_mtl import weights
from optax_mtl.methods.baseline import random_weights
from optax_mtl.methods.conflict import pcgrad
from tests.common import NUM_TASKS, matrices

J2 = [[-4.0, 1, 1], [6, 1, 1]]  # Of TorchJD's test_values.py.
J3 = [[3.0, 1, 0, 1], [-2, 1, 1, 0], [1, -1, 2, 0.5]]
NESTED = [[1.0, 0], [2, 1]]  # The second is longer in the direction of the first.
ONE = [[3.0, 4]]
EQUAL = [[1.0, 2, 2]] * 3
OPPOSITE = [[1.0, 0], [-2, 0]]
KRUM = [[1.0, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]]
EYE2, EYE3 = np.eye(2), np.eye(3)


class Row(NamedTuple):
    name: str
    options: dict[str, Any]
    gradients: Any
    weights: Any = None  # None where only the update is known.
    update: Any = None  # None where it is the combination with these weights.
    source: str = "NumPy"
    tolerance: float = 1e-6
    losses: Any = None
    steps: int = 1


def shortest_of_two(m11, m12, m22):
    first = (m22 - m12) / (m11 + m22 - 2 * m12)
    return np.array([first, 1 - first])


COSINE = -22 / np.sqrt(18 * 38)
BY_LOSS = shortest_of_two(18 / 4, -22, 38 * 4)
BY_PRODUCT = shortest_of_two(1 / 4, COSINE, 4)
NORMS = np.sqrt([18, 38])
NORMS3 = np.sqrt([11, 6, 6.25])
LOSSES3, INVERSE3 = [2, 0.5, 1], np.array([0.5, 2, 1])
RAW = {"apply_to": "raw"}
FREE = {"max_norm": None}
PAPER = {"rescale": False}
REG = {"reg_eps": 1e-4}  # As in the authors' code.
SGD = optax.sgd(0.1)
TWO = "closed form for two tasks"

ROWS = [
    Row("linear", {}, J2, [1, 1], [2, 2, 2]),
    Row("mean", {}, J2, [0.5, 0.5], [1, 1, 1]),
    Row("mgda", {}, J2, [0.6, 0.4], [0, 1, 1], "TorchJD, NumPy"),
    Row("mgda", {"normalization": "l2"}, J2, 0.5 / NORMS, source=TWO),
    Row("mgda", {"normalization": "l2"} | RAW, J2, [0.5, 0.5], [1, 1, 1], TWO),
    Row("mgda", {"normalization": "loss"}, J2, BY_LOSS / [2, 0.5], losses=[2, 0.5]),
    Row("mgda", {"normalization": "loss"} | RAW, J2, BY_LOSS, losses=[2, 0.5]),
    Row(
        "mgda",
        {"normalization": "loss+"},
        J2,
        BY_PRODUCT / ([2, 0.5] * NORMS),
        losses=[2, 0.5],
        source=TWO,
    ),
    Row(
        "mgda",
        {"preference": [2.0, 1.0]},
        J2,
        shortest_of_two(72, -44, 38) * [2, 1],
        source=TWO,
    ),
    Row("mgda", {}, J3, [0.316619, 0.514327, 0.169054]),
    Row("mgda", {}, NESTED, [1, 0], source=TWO),
    Row("mgda", {}, NESTED[::-1], [0, 1], source=TWO),
    Row("pcgrad", {}, J2, [2.222222, 1.578947], [0.584795, 3.80117, 3.80117]),
    Row("gradvac", {}, J2, [2.222222, 1.578947], [0.584795, 3.80117, 3.80117]),
    Row(
        "gradvac",
        {"beta": 0.5},
        J2,
        [1.857988, 1.406415],
        [1.00654, 3.264403, 3.264403],
        steps=2,
    ),
    Row(
        "cagrad",
        {"c": 0.5} | PAPER,
        J2,
        [0.704124, 0.5],
        [0.183503, 1.204124, 1.204124],
        source="SLSQP, TorchJD",
    ),
    # By their formulae, in NumPy.
    Row(
        "imgrad",
        {"c": 0.8},
        [[1, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]],
        [0.493266, 0.336507, 0.284255],
    ),
    Row("mmpareto", {}, J2, [2.204541, 1.469694]),
    Row(
        "fedmgda",
        {"epsilon": 0.1},
        [[1, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]],
        np.array([0.392486, 0.233333, 0.374181]) / np.sqrt([6, 6, 14.25]),
        source="quadprog",
    ),
    Row("and_mask", {"threshold": 0.5}, J2, update=[0, 1.5, 1.5]),
    Row("fedmgda", {"epsilon": 0.0}, J2, 0.5 / NORMS, source="average of units"),
    Row("mmpareto", {"gamma": 1.0}, EYE3, [1, 1, 1], source="no conflict: the sum"),
    # RACO by its formulae; the second by SciPy's SLSQP, too.
    Row(
        "cagrad",
        {"c": 0.5, "preference": [0.2, 0.8], "clip": True} | PAPER,
        [[1, -4], [-1, 1]],
        [0.327519, 1.210518],
    ),
    Row(
        "cagrad",
        {"c": 0.4, "preference": [0.5, 0.3, 0.2], "clip": True} | PAPER,
        [[1, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]],
        [0.681666, 0.428554, 0.292221],
    ),
    Row("cagrad", {}, J2, [0.57181, 0.431034], [0.298968, 1.002844, 1.002844]),
    Row("cagrad", {"c": 1.0} | PAPER, J2, [1.2, 0.8], [0, 2, 2], "2 x MGDA"),
    Row("cagrad", {"c": 0.5} | PAPER, J3, [0.358164, 0.627026, 0.333333]),
    Row("imtl_g", {}, J2, [0.59233, 0.40767], [0.076697, 1, 1], "NumPy, TorchJD"),
    Row("imtl_g", {"strict_paper": True}, J2, [0.59233, 0.40767]),
    Row("imtl_g", {}, J3, [0.349135, 0.513167, 0.137699]),
    Row("nash_mtl", {}, J2, [0.418226, 0.287843], [0.054153, 0.706069, 0.706069]),
    Row("nash_mtl", FREE, J2, [0.591461, 0.407071], [0.076584, 0.998533, 0.998533]),
    Row("nash_mtl", FREE, J3, [0.431395, 0.669775, 0.368637]),
    Row(
        "fairgrad",
        {"alpha": 1.0} | FREE,
        J2,
        [0.591461, 0.407071],
        [0.076584, 0.998533, 0.998533],
    ),
    Row("fairgrad", {"alpha": 1.0} | FREE, J3, [0.431395, 0.669775, 0.368637]),
    Row("fairgrad", FREE, J2, [0.471363, 0.319454], [0.031274, 0.790817, 0.790817]),
    Row("fairgrad", {"alpha": 0.0} | FREE, J2, [0.5, 0.5], [1, 1, 1], "TorchJD"),
    Row("fairgrad", {"alpha": 0.5} | FREE, J3, [0.549221, 0.802294, 0.514086]),
    Row("fairgrad", FREE, J3, [0.347638, 0.556788, 0.262387]),
    Row("fairgrad", {"alpha": 5.0} | FREE, J3, [0.28536, 0.462941, 0.184318]),
    Row("aligned_mtl", {}, J2, [1.118144, 0.816522], [0.426557, 1.934666, 1.934666]),
    *(
        Row(
            "aligned_mtl",
            {"preference": [0.5, 0.5], "scale_mode": scale_mode},
            J2,
            *expected,
            source="TorchJD",
            tolerance=5e-5,
        )
        for scale_mode, *expected in [
            ("min", [0.5591, 0.4083], [0.2133, 0.9673, 0.9673]),
            ("median", [0.5591, 0.4083], [0.2133, 0.9673, 0.9673]),
            ("rmse", [1.5109, 1.1033], [0.5764, 2.6142, 2.6142]),
        ]
    ),
    Row("aligned_mtl", {}, J3, [0.762373, 1.081985, 0.609884]),
    Row("aligned_mtl", {"scale_mode": "median"}, J3, [1.063481, 1.509328, 0.850765]),
    Row("aligned_mtl", {"scale_mode": "rmse"}, J3, [1.260979, 1.789624, 1.00876]),
    Row("upgrad", {}, J2, [10 / 9, 15 / 19], [0.292398, 1.900585, 1.900585]),
    Row("upgrad", {}, J3, [0.484848, 0.666667, 0.333333]),
    Row("upgrad", REG, J2, [1.110921, 0.789431], [0.292902, 1.900352, 1.900352]),
    Row("upgrad", REG, J3, [0.484816, 0.666538, 0.333333]),
    Row("dualproj", {}, J2, [11 / 18, 0.5], [5 / 9, 10 / 9, 10 / 9], TWO),
    Row("dualproj", REG, J2, [0.610921, 0.5], [0.556316, 1.110921, 1.110921]),
    Row("dualproj", {}, J3, [1 / 3, 1 / 3, 1 / 3], source="the mean is in the cone"),
    Row("config", {}, J2, [1.226483, 0.844124], [0.158809, 2.070607, 2.070607]),
    Row("config", {}, J3, [1.045953, 1.537369, 0.412524]),
    Row(
        "krum",
        {"num_byzantine": 1, "num_selected": 4},
        KRUM,
        [0.25, 0.25, 0, 0.25, 0.25],
        [1.25, 0.75, 1.5],
        source="TorchJD",
    ),
    Row("trimmed_mean", {"num_trimmed": 2}, KRUM, update=[1, 0, 1], source="median"),
    Row("inverse_norm", {}, J3, (11**0.5 + 6**0.5 + 2.5) / 3 / NORMS3, source="norms"),
    Row("inverse_norm", {"target": "max"}, J3, 11**0.5 / NORMS3, source="norms"),
    Row(
        "inverse_norm",
        {"target": "harmonic"},
        J3,
        3 / NORMS3 / np.sum(1 / NORMS3),
        source="norms",
    ),
    Row(
        "sdmgrad",
        {"regularization": 0.3},
        J3,
        (np.array([0.311605, 0.568625, 0.119771]) + 0.1) / 1.3,
    ),
    Row("modo", {"gamma": 0.1, "rho": 0.1}, J3, [0.230556, 0.513889, 0.255556]),
    Row("modo", {"gamma": 0.1, "rho": 0.1}, J2, [1, 0], source="TorchJD"),
    Row(
        "moco",
        {"beta": 0.5, "gamma": 0.1},
        J3,
        update=[0.239931, 0.186111, 0.503125, 0.232292],
    ),
    # The first update is the sum; later ones are in test_balancing.py.
    Row("gradnorm", {}, J3, [1, 1, 1], losses=LOSSES3),
    Row("excess_mtl", {}, J3, update=[2, 1, 3, 1.5], source="sum"),
    # Equal norms, since all gradients of log losses are scaled to the largest.
    Row("db_mtl", {"beta": 0.0}, EYE3, update=[2, 2, 2], losses=LOSSES3),
    Row("db_mtl", {"beta": 0.9}, EYE3, update=[0.2, 0.2, 0.2], losses=LOSSES3),
    Row(
        "loss_balancer",
        {"preference": [1.0, 2.0, 3.0]},
        J3,
        np.array([1, 2, 3]) / 6 / NORMS3,
        source="shares over norms",
    ),
    # VQGAN's, by its formula.
    Row("adaptive_weight", {"epsilon": 1e-4}, J2, [1, 0.688236]),
    Row(
        "adaptive_weight",
        {"weight": [0.5, 1.0, 2.0], "primary": 2},
        J3,
        [0.5 * 2.5 / 11**0.5, 2.5 / 6**0.5, 1],
        source="norms",
    ),
    Row("adaptive_weight", {"max_ratio": 0.5, "weight": 3.0}, J2, [1, 1.5]),
    Row(
        "lr_annealing",
        {"primary": 1, "decay": 0.5},
        J3,
        update=(1 + 2 * 4 / 5) / 2 * np.array(J3[0])
        + np.array(J3[1])
        + (1 + 2 * 4 / 4.5) / 2 * np.array(J3[2]),
        source="largest entry 2, sums of magnitudes 5 and 4.5, of 4 entries",
    ),
    Row("gls", {}, EYE3, [1 / 6, 2 / 3, 1 / 3], losses=LOSSES3),
    Row("scale_invariant", {}, EYE3, [0.5, 2, 1], losses=LOSSES3),
    Row("stch", {"reference": [1.0, 1, 2]}, EYE3, [1, 1, 0.5], losses=LOSSES3),
    Row("famo", {}, EYE3, [0.142857, 0.571429, 0.285714], losses=LOSSES3),
    Row("imtl_l", {}, EYE3, [1, 1, 1], losses=LOSSES3),
    Row("dwa", {}, EYE3, [1, 1, 1], losses=LOSSES3),
    Row("uw_so", {}, EYE3, np.exp(INVERSE3) / np.sum(np.exp(INVERSE3)), losses=LOSSES3),
    Row(
        "v_rex",
        {"beta": 0.5},
        EYE3,
        [11 / 18, 2 / 18, 5 / 18],
        source="by hand: (1 + L - 7 / 6) / 3",
        losses=LOSSES3,
    ),
    Row("group_dro", {"step_size": 0.0}, EYE3, [1 / 3] * 3, losses=LOSSES3),
    Row("cov_weighting", {}, EYE3, [1 / 3] * 3, losses=LOSSES3),
    Row("softadapt", {}, EYE3, [1, 1, 1], losses=LOSSES3),
    Row("relobralo", {}, EYE3, [1, 1, 1], losses=LOSSES3),
    Row(
        "go4align",
        {"step_size": 0.0},
        EYE3,
        [7 / 8, 7 / 3, 7 / 8],
        source="by hand: (7 / 2) / 3 / L, and the mean of the two that are closest",
        losses=LOSSES3,
    ),
    Row(
        "igb",
        {"reference": [2.0, 1, 1]},
        EYE3,
        3 * np.exp([1, 0.5, 1]) / np.sum(np.exp([1, 0.5, 1])) * INVERSE3,
        source="authors' code, T softmax(L / z) log L",
        losses=LOSSES3,
    ),
    Row("uncertainty_weighting", {}, EYE2, [0.5, 0.5], losses=[4, 1]),
    Row(
        "uncertainty_weighting",
        {"optimizer": SGD},
        EYE2,
        [0.5 * np.exp(-0.15), 0.5],
        source="s = 0.1 (2 - 1/2)",
        losses=[4, 1],
        steps=2,
    ),
    Row(
        "uncertainty_weighting",
        {"form": "classification", "optimizer": SGD},
        EYE2,
        np.exp([-0.35, -0.05]),
        source="s = 0.1 (L - 1/2)",
        losses=[4, 1],
        steps=2,
    ),
    Row(
        "uncertainty_weighting",
        {"form": "tutorial", "optimizer": SGD},
        EYE2,
        [np.exp(-0.3), 1],
        source="s = 0.1 (L - 1)",
        losses=[4, 1],
        steps=2,
    ),
    Row(
        "uncertainty_weighting",
        {"form": ["regression", "classification"], "initial": -0.5, "optimizer": SGD},
        EYE2,
        np.exp([0.5 - 0.1 * (2 * np.exp(0.5) - 0.5), 0.5 - 0.1 * (np.exp(0.5) - 0.5)])
        * [0.5, 1],
        source="s = -1/2 + 0.1 (a exp(1/2) L - 1/2)",
        losses=[4, 1],
        steps=2,
    ),
    # Equal gradients; tests/test_promises.py has those of scale "sum" and "mean".
    Row("aligned_mtl", {"preference": [1 / 3] * 3}, EQUAL, update=EQUAL[0]),
    Row("cagrad", {"c": 0.5} | PAPER, EQUAL, update=1.5 * np.array(EQUAL[0])),
    Row("nash_mtl", FREE, EQUAL, update=np.array(EQUAL[0]) / 3**0.5),
    # One task.
    Row("nash_mtl", {}, ONE, [0.2], [0.6, 0.8], "unit vector"),
    Row("fairgrad", FREE, ONE, [5 ** (-4 / 3)], source="n ** (-2 a / (1 + a))"),
    Row("cagrad", {"c": 0.5}, ONE, [1.2], source="(1 + c) / (1 + c ** 2)"),
    *(
        Row(name, options, ONE, [weight], source="table of methods", losses=[4])
        for name, options, weight in [
            ("dwa", {}, 1),
            ("gls", {}, 1),
            ("famo", {}, 1),
            ("stch", {"reference": 2.0}, 1 / 4),
            ("scale_invariant", {}, 1 / 4),
            ("uncertainty_weighting", {}, 1 / 2),
            ("imtl_l", {}, 1),
        ]
    ),
    # Opposite gradients: Pareto stationary.
    Row("linear", {}, OPPOSITE, update=[-1, 0]),
    Row("cagrad", {"c": 0.5} | PAPER, OPPOSITE, update=[-0.25, 0], source="by hand"),
    Row("cagrad", {"c": 1.5} | PAPER, OPPOSITE, update=[0, 0], source="0 is the best"),
    Row("upgrad", REG, OPPOSITE, update=[-0.0004, 0], tolerance=5e-5 / 2),
    Row("mgda", {}, OPPOSITE, [2 / 3, 1 / 3], [0, 0]),
    Row("pcgrad", {}, OPPOSITE, update=[0, 0]),
    Row("upgrad", {}, OPPOSITE, update=[0, 0]),
    Row("dualproj", {}, OPPOSITE, update=[0, 0]),
    Row("aligned_mtl", {}, OPPOSITE, update=[-1, 0]),
    Row("config", {}, OPPOSITE, update=[0, 0], source="the pseudo-inverse gives 0"),
    Row("imtl_g", {}, OPPOSITE, update=[0, 0], source="(2, 1) / 3 by the paper"),
    Row("imtl_g", {"strict_paper": True}, OPPOSITE, [-1, 2], [-5, 0], tolerance=1e-5),
    Row("nash_mtl", FREE, OPPOSITE, [0, 0], source="no solution: zero by definition"),
    Row("fairgrad", FREE, OPPOSITE, [0, 0], source="no solution: zero by definition"),
]


def with_absent_tasks(row):
    """The same values with absent tasks up to five, so that all rows share shapes."""
    missing = 5 - len(row.gradients)
    pad = lambda x: np.append(x, np.zeros((missing, *np.shape(x)[1:])), axis=0)
    fill = lambda x: [*x, *x[:1] * missing] if isinstance(x, list) else x
    options = {name: fill(value) for name, value in row.options.items()}
    losses = None if row.losses is None else pad(row.losses)
    return row._replace(gradients=pad(row.gradients), losses=losses, options=options)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.name}-{len(r.gradients)}")
def test_value(row, double):
    num_tasks = len(row.gradients)
    expected = row
    if not double and "ignores_absent" in optax_mtl.METHODS[row.name].promises:
        row = with_absent_tasks(row)
    with jax.enable_x64(double):
        gradients = jnp.asarray(row.gradients, float)
        losses = None if row.losses is None else jnp.asarray(row.losses, float)
        method = optax_mtl.get(row.name, len(gradients), **row.options)
        elementwise = "gradients" in optax_mtl.METHODS[row.name].reads
        view = optax_mtl.GramView(len(gradients), lambda: optax_mtl.gram(gradients))
        updates = gradients if elementwise else view
        # Not compiled: operations on these few shapes are shared by all rows.
        state = method.init(gradients[0])
        for _ in range(row.steps):
            found, state = method.update(updates, state, losses=losses)
    # Half a unit of the last digit given; in float32, the accuracy of the Gram matrix.
    tolerance = max(row.tolerance, 0 if double else 1e-5)
    if row.weights is not None:
        weights = np.asarray(found)[:num_tasks]
        np.testing.assert_allclose(weights, expected.weights, atol=tolerance)
    if row.update is not None:
        update = found if elementwise else np.asarray(found) @ np.array(row.gradients)
        size = max(np.linalg.norm(row.gradients, axis=1).max(), 1)
        np.testing.assert_allclose(update, row.update, atol=tolerance * size)


def random_gradients(num_tasks=5, seed=0):
    """Gradients whose norms differ by a factor of about ten, shape (8, T, 12)."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(size=(8, num_tasks, 1)))
    return scales * rng.normal(size=(8, num_tasks, 12))


BATCH = random_gradients()
GRAMS = BATCH @ BATCH.transpose(0, 2, 1)
TASK_NORMS = np.sqrt(np.einsum("nii->ni", GRAMS))


def weights_of(name, grams=GRAMS, **options):
    """Weights for a batch of Gram matrices, in float64."""
    method = optax_mtl.get(name, grams.shape[1], **options)

    def find(gram):
        view = optax_mtl.GramView(len(gram), lambda: gram)
        return method.update(view, method.init(None))[0]

    return in_float64(find, grams)


def in_float64(function, *batches):
    """A function of each of some entries; not compiled, as the values above."""
    with jax.enable_x64(True):
        return np.stack([function(*map(jnp.asarray, x)) for x in zip(*batches)])


def test_pcgrad_in_given_orders():
    gram = jnp.asarray(np.array(J3) @ np.array(J3).T)
    for order, expected in [
        ([0, 1, 2], [1.454545, 2, 1]),
        ([2, 1, 0], [1.418182, 2, 1.16]),
    ]:
        orders = jnp.tile(jnp.array(order), (3, 1))
        np.testing.assert_allclose(weights.pcgrad(gram, orders), expected, atol=1e-5)
    fixed = optax_mtl.pcgrad(order="fixed")
    update, _ = fixed.update(jnp.array(J3), fixed.init(None))
    np.testing.assert_allclose(update, np.array([1.454545, 2, 1]) @ J3, atol=1e-5)


def test_dwa_of_given_rates():
    found = weights.dwa(jnp.array([0.5, 1, 2]))
    np.testing.assert_allclose(found, [0.681659, 0.875268, 1.443073], atol=1e-6)


def test_moco_weights():
    method = optax_mtl.moco(3)
    _, state = method.update(jnp.array(J3), method.init(jnp.zeros(4)))
    expected = [0.307639, 0.378472, 0.313889]
    np.testing.assert_allclose(optax.tree.get(state, "weights"), expected, atol=1e-6)


def test_nash_has_squared_norm_of_the_number_of_tasks_and_is_fairgrad_of_one():
    found = weights_of("nash_mtl", max_norm=None)
    squares = np.einsum("ni,nij,nj->n", found, GRAMS, found)
    np.testing.assert_allclose(squares, 5, rtol=1e-9)
    limited = found / np.sqrt(5)  # To norm 1, that of the default.
    np.testing.assert_allclose(weights_of("fairgrad", alpha=1.0), limited, rtol=1e-9)


def test_fairgrad_solves_its_equations_and_is_homogeneous():
    preference = np.array([1.0, 2, 0.5, 3, 1])
    alphas = np.array([0.5, 1, 2, 4] * 2)
    fair = lambda gram, alpha: weights.fairgrad(gram, jnp.asarray(preference), alpha)
    found = in_float64(fair, GRAMS, alphas)
    progress = np.einsum("nij,nj->ni", GRAMS, found)
    powers = found ** (-1 / alphas[:, None])
    np.testing.assert_allclose(progress, preference * powers, rtol=1e-8)
    # Ten times the gradients: weights for updates 10 ** ((1 - a) / (1 + a)) as long.
    larger = in_float64(fair, 100 * GRAMS, alphas)
    factors = 10 ** (-2 * alphas / (1 + alphas))
    np.testing.assert_allclose(larger, factors[:, None] * found, rtol=1e-8)


def test_cagrad_against_slsqp_and_the_mean():
    radii = np.array([0, 0.2, 0.4, 0.8] * 2)
    uniform = np.full(5, 1 / 5)
    search = lambda gram, c: weights.cagrad(gram, c, jnp.asarray(uniform))
    found = in_float64(search, GRAMS, radii)
    np.testing.assert_allclose(found[::4], np.full((2, 5), 1 / 5), rtol=1e-9)
    normalized = GRAMS / np.einsum("nii->n", GRAMS)[:, None, None]
    for w, gram, c in zip(found, normalized, radii):
        radius = c * np.sqrt(uniform @ gram @ uniform)
        hull = scipy.optimize.minimize(
            lambda x, g=gram, r=radius: x @ g @ uniform + r * np.sqrt(x @ g @ x),
            uniform,
            method="SLSQP",
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 1000},
        ).x
        expected = uniform + radius / np.sqrt(hull @ gram @ hull) * hull
        np.testing.assert_allclose(w, expected, atol=1e-5)  # SLSQP's own accuracy.


@pytest.mark.parametrize("kind", ["any", "strong"])
def test_cagrad_with_a_ball_that_contains_zero_never_conflicts(kind):
    batch = matrices(kind)
    grams = batch @ batch.transpose(0, 2, 1)
    search = lambda gram, c: weights.cagrad(gram, c, jnp.full(NUM_TASKS, 1 / NUM_TASKS))
    for c in (1.0, 1.5):
        found = in_float64(search, grams, np.full(len(grams), c))
        progress = np.einsum("nij,nj->ni", grams, found)
        assert np.all(progress >= -1e-6 * np.einsum("nii->n", grams)[:, None])
    if kind == "strong":
        np.testing.assert_array_equal(found, 0)


def test_first_step_of_gradvac_is_pcgrad():
    @jax.jit
    def both(gram):
        orders = pcgrad.random_orders(jax.random.key(1), 5)
        vaccinated, _ = weights.gradvac(gram, jnp.zeros((5, 5)), orders)
        return jnp.stack([vaccinated, weights.pcgrad(gram, orders)])

    vaccinated, projected = np.moveaxis(in_float64(both, GRAMS), 1, 0)
    np.testing.assert_allclose(vaccinated, projected, rtol=1e-5)


def test_gradvac_changes_vectors_as_the_paper_does():
    beta, key = 0.3, jax.random.key(2)
    targets, expected = np.zeros((5, 5)), np.zeros((5, 5))
    vaccinate = jax.jit(weights.gradvac)
    with jax.enable_x64(True):
        for matrix in BATCH[:4]:
            key, order_key = jax.random.split(key)
            orders = pcgrad.random_orders(order_key, 5)
            gram = jnp.asarray(matrix @ matrix.T)
            found, targets = vaccinate(gram, targets, orders, beta)
            total = 0
            for i, order in enumerate(np.asarray(orders)):
                g = matrix[i].copy()
                for j in order[order != i]:
                    length, other = np.linalg.norm(g), np.linalg.norm(matrix[j])
                    phi, aim = g @ matrix[j] / length / other, expected[i, j]
                    if phi < aim:
                        sine = np.sqrt(1 - aim**2)
                        step = length * (aim * np.sqrt(1 - phi**2) - phi * sine)
                        g += step / (other * sine) * matrix[j]
                    expected[i, j] = (1 - beta) * aim + beta * phi
                total += g
            np.testing.assert_allclose(found @ matrix, total, rtol=1e-8)
            np.testing.assert_allclose(targets, expected, rtol=1e-8)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("num_selected", [1, 3])
def test_krum_scores_like_numpy(squared, num_selected):
    find = lambda gram: weights.krum(gram, 1, num_selected, squared)
    for matrix, found in zip(BATCH, in_float64(jax.jit(find), GRAMS)):
        distances = np.linalg.norm(matrix[:, None] - matrix[None], axis=2)
        nearest = np.sort(distances ** (2 if squared else 1), axis=1)[:, 1:3]
        chosen = np.argsort(nearest.sum(axis=1))[:num_selected]
        expected = np.isin(np.arange(5), chosen) / num_selected
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_upgrad_of_two_tasks_is_half_of_pcgrad():
    two = random_gradients(2)
    grams = two @ two.transpose(0, 2, 1)
    orders = np.tile(np.arange(2), (8, 2, 1))
    half = in_float64(jax.jit(weights.pcgrad), grams, orders) / 2
    np.testing.assert_allclose(weights_of("upgrad", grams), half, rtol=1e-9)


@pytest.mark.parametrize("preference", [None, [1.0, 2, 0.5, 1, 3]])
def test_config_has_cosines_in_ratio_of_the_preference(preference):
    found = weights_of("config", preference=preference)
    ratios = np.einsum("nij,nj->ni", GRAMS, found) / TASK_NORMS / (preference or 1)
    np.testing.assert_allclose(ratios, ratios[:, :1] * np.ones(5), rtol=1e-9)
    assert np.all(ratios > 0)


@pytest.mark.parametrize(
    "length, norm",
    [
        ("min", min(NORMS)),
        ("max", max(NORMS)),
        ("arithmetic", np.mean(NORMS)),
        ("geometric", np.sqrt(np.prod(NORMS))),
        ("harmonic", 2 / np.sum(1 / NORMS)),
        (0, NORMS[0]),
    ],
)
def test_lengths_of_config(length, norm):
    with jax.enable_x64(True):
        gram = jnp.asarray(np.array(J2) @ np.array(J2).T)
        found = weights.config(gram, jnp.ones(2), length)
        actual = jnp.sqrt(found @ gram @ found)
    cosine = np.sqrt((1 + COSINE) / 2)  # With the bisector of the two.
    np.testing.assert_allclose(actual, 2 * cosine * norm, rtol=1e-9)


def test_imtl_g_has_equal_projections():
    projections = np.einsum("nij,nj->ni", GRAMS, weights_of("imtl_g")) / TASK_NORMS
    expected = projections[:, :1] * np.ones(5)
    np.testing.assert_allclose(projections, expected, rtol=1e-9)


def test_imtl_g_does_not_ascend():
    norms, cosines = np.array([1, 1, 0.1]), np.eye(3)
    cosines[2, :2] = cosines[:2, 2] = 0.65
    gram = np.outer(norms, norms) * cosines
    with jax.enable_x64(True):
        strict = np.asarray(weights.imtl_g(jnp.asarray(gram), strict_paper=True))
        guarded = np.asarray(weights.imtl_g(jnp.asarray(gram)))
    np.testing.assert_allclose(strict, [-0.152, -0.152, 1.304], atol=5e-4)
    np.testing.assert_allclose(gram @ strict / norms, [-0.067] * 3, atol=5e-4)
    projections = gram @ guarded / norms
    np.testing.assert_allclose(projections, projections[0], rtol=1e-9)
    assert projections[0] > 0


def test_mgda_and_projections_against_quadprog():
    eye, uniform, zero = np.eye(5), np.full(5, 1 / 5), np.zeros(5)
    mgda, upgrad, dualproj = map(weights_of, ["mgda", "upgrad", "dualproj"])
    simplex = np.column_stack([np.ones(5), eye])
    for i, gram in enumerate(GRAMS):
        solve = lambda *rest, q=gram: quadprog.solve_qp(q, zero, *rest)[0]
        expected = solve(simplex, np.append(1.0, zero), 1)
        np.testing.assert_allclose(mgda[i], expected, rtol=1e-7, atol=1e-9)
        expected = sum(solve(eye, row) for row in eye) / 5
        np.testing.assert_allclose(upgrad[i], expected, rtol=1e-7, atol=1e-9)
        expected = solve(eye, uniform)
        np.testing.assert_allclose(dualproj[i], expected, rtol=1e-7, atol=1e-9)


def test_expectation_of_graddrop_is_the_sum():
    gradients, count = jnp.array([[1.0, -4, 3, 0], [2, -2, -1, 0], [0, 1, -3, 0]]), 4096
    draw = lambda key: optax_mtl.graddrop().update(
        gradients, optax_mtl.graddrop(key=key).init(None)
    )[0]
    keys = jax.random.split(jax.random.key(0), count)
    updates = np.asarray(jax.jit(jax.vmap(draw))(keys))
    total, sizes = gradients.sum(axis=0), jnp.abs(gradients).sum(axis=0)
    # A draw is the sum of one sign: two values that are `sizes` apart.
    values = np.stack([(total + sizes) / 2, (total - sizes) / 2])
    assert np.all(np.isclose(updates, values[0]) | np.isclose(updates, values[1]))
    deviation = np.sqrt(-np.prod(values, axis=0) / count)
    assert np.all(np.abs(updates.mean(axis=0) - total) <= 5 * deviation)


def test_graddrop_leaks_and_keeps():
    gradients = jnp.array([[1.0, -4], [-2, 3]])
    for options, expected in [
        ({"leak": 1.0}, [-1, -1]),
        ({"keep": jnp.ones_like}, [1, 3]),
        ({"keep": jnp.ones_like, "leak": [0.0, 0.5]}, [0, 3]),
    ]:
        method = optax_mtl.graddrop(**options)
        update, _ = method.update(gradients, method.init(jnp.zeros(2)))
        np.testing.assert_allclose(update, expected)


@pytest.mark.parametrize("distribution", random_weights.DISTRIBUTIONS)
def test_random_weights_are_weights_and_fair(distribution):
    count = 4096
    draw = lambda step: weights.random(jax.random.key(5), step, 4, distribution)
    drawn = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(count)))
    np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-5)
    assert np.all(drawn >= 0)
    if distribution == "random_normal":  # Each task has a mean of its own.
        return
    deviation = drawn.std(axis=0) / np.sqrt(count)
    assert np.all(np.abs(drawn.mean(axis=0) - 1 / 4) <= 5 * deviation)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optax_mtl.mgda("l1"), "'none', 'l2'"),
        (lambda: optax_mtl.mgda(apply_to="both"), "'normalized'"),
        (lambda: optax_mtl.pcgrad(order="priority"), "'random', 'fixed' or 'losses'"),
        (lambda: optax_mtl.upgrad(reg_eps=-1e-4), "at least 0"),
        (lambda: optax_mtl.mgda(preference=[1.0, -1.0]), "at least 0"),
        (lambda: optax_mtl.upgrad(preference=[0.0, 0.0]), "not all of them 0"),
        (lambda: optax_mtl.dualproj(preference=[[1.0]]), "one finite number"),
        (lambda: optax_mtl.nash_mtl(max_norm=0.0), "should be positive"),
        (lambda: optax_mtl.nash_mtl(preference=-1.0), "at least 0"),
        (lambda: optax_mtl.fairgrad(-1.0), "alpha is -1.0; it should be at least 0"),
        (lambda: optax_mtl.aligned_mtl("mean"), "'min', 'median' or 'rmse'"),
        (lambda: optax_mtl.config("mean"), "choose one of projection"),
        (lambda: optax_mtl.krum(-1), "at least 0"),
        (lambda: optax_mtl.krum(num_selected=0), "at least 1"),
        (lambda: optax_mtl.trimmed_mean(-1), "at least 0"),
        (lambda: optax_mtl.graddrop(leak=2.0), "leak is 2.0; it should be in"),
        (lambda: optax_mtl.random_weights("gauss"), "'normal', 'uniform'"),
        (lambda: optax_mtl.uncertainty_weighting(2, form="l1"), "choose one of"),
        (
            lambda: optax_mtl.uncertainty_weighting(2, form=["regression"]),
            "for each of the 2",
        ),
        (lambda: optax_mtl.dwa(2, window=0), "window is 0; .* at least 1"),
        (lambda: optax_mtl.uw_so(0.0), "temperature is 0.0; it should be positive"),
        (lambda: optax_mtl.stch(2, -1.0), "mu is -1.0; it should be positive"),
        (lambda: optax_mtl.igb(2, window=0), "window is 0; .* at least 1"),
        (lambda: optax_mtl.excess_mtl(2, warmup_steps=0), "at least 1"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "method, message",
    [
        (optax_mtl.upgrad(preference=[1.0, 1, 1]), r"shape \(3,\), but there are 2"),
        (optax_mtl.graddrop(leak=[0.1] * 3), r"leak has shape \(3,\), but there are 2"),
        (optax_mtl.krum(1), "needs at least 4 tasks, but there are 2"),
        (optax_mtl.krum(0, num_selected=3), "cannot select"),
        (optax_mtl.trimmed_mean(1), "needs at least 3 tasks, but there are 2"),
        (optax_mtl.config(2), "from 0 to 1"),
    ],
)
def test_options_that_do_not_fit_the_tasks(method, message):
    with pytest.raises(ValueError, match=message):
        method.update(jnp.eye(2), method.init(jnp.zeros(2)))
