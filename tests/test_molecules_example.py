"""The molecules example end to end, in miniature, on files made here."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from sklearn.metrics import roc_auc_score

from examples import runs
from examples.molecules import config as config_lib
from examples.molecules import data, model, race, train
from examples.molecules.config import Config

TINY = ["--width", "4", "--depth", "1", "--batch-size", "8"]


def quantum(count=60, atoms=4):
    rng = np.random.default_rng(0)
    charges = rng.choice([1, 6, 8], (count, atoms)).astype(np.uint8)
    charges[:, 2:] *= rng.random((count, atoms - 2)) < 0.7
    return {
        "charges": charges,
        "positions": rng.normal(size=(count, atoms, 3)).astype(np.float32),
        "targets": rng.normal(size=(count, 3)) * [1e-2, 1, 300],
        "names": np.array(["homo", "mu", "r2"]),
    }


def assays(count=120, tasks=3):
    rng = np.random.default_rng(0)
    labels = rng.choice([-1, 0, 1], (count, tasks), p=[0.2, 0.5, 0.3])
    return {
        "fingerprints": rng.integers(256, size=(count, 2)).astype(np.uint8),
        "labels": labels.astype(np.int8),
        "scaffold": rng.integers(30, size=count),
        "tasks": np.array([f"assay {i}" for i in range(tasks)]),
    }


def save(folder, arrays):
    np.savez(folder / "file.npz", **arrays)
    return str(folder / "file.npz")


# Features, splits, losses and scores


def test_a_coulomb_matrix_knows_neither_rotations_nor_the_order_of_atoms():
    rng = np.random.default_rng(1)
    charges, positions = (quantum()[name] for name in ("charges", "positions"))
    rotations = np.linalg.qr(rng.normal(size=(len(charges), 3, 3)))[0]
    moved = np.einsum("nai,nij->naj", positions, rotations) + rng.normal(size=3)
    order = rng.permuted(np.tile(np.arange(4), (len(charges), 1)), axis=1)
    moved = np.take_along_axis(moved, order[..., None], axis=1)
    again = data.coulomb(np.take_along_axis(charges, order, axis=1), moved)
    found = data.coulomb(charges, positions)
    np.testing.assert_allclose(again, found, rtol=2e-4)
    stretched = data.coulomb(charges, 2 * positions)
    assert np.abs(stretched - found).max(axis=1).min() > 0.1


def test_the_coulomb_matrix_of_a_molecule_by_hand():
    """Hydrogen fluoride, 0.92 angstrom long, with room for a third atom."""
    charges = np.array([[1, 0, 9]], np.uint8)
    positions = np.array([[[0, 0, 0.92], [0, 0, 0], [0, 0, 0]]], np.float32)
    fluorine, bond = 0.5 * 9**2.4, 9 * 0.529177 / 0.92
    expected = [[fluorine, bond, 0, 0.5, 0, 0]]
    np.testing.assert_allclose(data.coulomb(charges, positions), expected, rtol=1e-6)


def test_a_scaffold_stays_together():
    rng = np.random.default_rng(0)
    scaffold = np.concatenate([np.zeros(400, int), rng.integers(1, 200, 600)])
    parts = data.split_groups(scaffold, Config())
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    sets = [set(scaffold[part]) for part in parts]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert 0 in sets[0]  # Larger than all that is held out.
    assert all(140 < len(part) <= 150 for part in parts[1:])
    other = data.split_groups(scaffold, Config(split_seed=1))
    assert set(other[2]) != set(parts[2])
    again = data.split_groups(scaffold, Config(seed=1))
    jax.tree.map(np.testing.assert_array_equal, again, parts)


def test_auc_is_that_of_scikit_learn_with_ties_and_missing_labels():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 5)).astype(np.float32)
    scores[:, 1:] = scores[:, 1:].round()  # Ties within and across the labels.
    scores[:, 4] = 0.5
    labels = (rng.random((300, 5)) < 0.2).astype(np.float32)
    mask = (rng.random((300, 5)) < [1, 1, 0.3, 0.3, 0.5]).astype(np.float32)
    auc = jax.jit(jax.vmap(model.auc, in_axes=1))
    expected = [
        roc_auc_score(labels[has, i], scores[has, i])
        for i, has in enumerate(mask.T > 0)
    ]
    np.testing.assert_allclose(auc(scores, labels, mask), expected, rtol=1e-6)
    one_label = labels.copy()
    one_label[:, 0] = 1
    diverged = scores.copy()
    diverged[7, 1] = np.nan
    found = auc(diverged, one_label, mask)
    np.testing.assert_array_equal(np.isnan(found), [1, 1, 0, 0, 0])


@pytest.mark.parametrize("arrays", [quantum(), assays()])
def test_losses_are_those_of_a_loop_and_an_absent_task_has_no_gradient(
    arrays, tmp_path
):
    config = Config(data=save(tmp_path, arrays), width=4, standardise=False)
    molecules = data.load(config)
    problem = model.make_problem(config, molecules)
    inputs, targets, mask = (x[:9] for x in molecules.train)
    mask = mask * (np.arange(9)[:, None] != 5)
    mask[:, 1] = 0  # No labels in this batch.
    batch = data.Rows(inputs, targets, mask)

    @jax.jit
    def compute(key):
        params = problem.init(key)
        grads = jax.jacrev(problem.losses)(params, batch)
        return params, problem.losses(params, batch), grads

    params, losses, grads = compute(jax.random.key(0))
    x, layers = np.float64(inputs), nnx_layers(params)
    for kernel, bias in layers[:-1]:
        x = x @ kernel + bias
        x = x / (1 + np.exp(-x))
    out = x @ layers[-1][0] + layers[-1][1]
    for task in range(3):
        terms = []
        for row in range(9):
            if mask[row, task] and molecules.spread is not None:
                error = out[row, task] - targets[row, task]
                terms.append((molecules.spread[task] * error) ** 2)
            elif mask[row, task]:
                p = 1 / (1 + np.exp(-out[row, task]))
                terms.append(-np.log(p if targets[row, task] else 1 - p))
        expected = np.mean(terms) if terms else 0
        np.testing.assert_allclose(losses[task], expected, rtol=1e-4)
    norms = [
        sum((np.asarray(x)[task] ** 2).sum() for x in jax.tree.leaves(grads["trunk"]))
        for task in range(3)
    ]
    assert norms[1] == 0 and norms[0] > 0 and norms[2] > 0


def nnx_layers(params):
    layers = [*(params["trunk"][i] for i in range(2)), params["heads"]]
    return [
        [np.float64(layer[name][...]) for name in ("kernel", "bias")]
        for layer in layers
    ]


def test_the_units_of_targets_change_losses_and_not_scores(tmp_path):
    file = save(tmp_path, quantum())
    found = []
    for standardise in (True, False):
        config = Config(data=file, width=4, depth=1, standardise=standardise)
        molecules = data.load(config)
        problem = model.make_problem(config, molecules)
        compute = lambda key, problem=problem, rows=molecules.test: (
            problem.losses(problem.init(key), rows),
            problem.scores(problem.init(key), rows),
        )
        found.append(jax.jit(compute)(jax.random.key(0)))
    (plain, score), (raw, same) = found
    np.testing.assert_allclose(raw, plain * molecules.spread**2, rtol=1e-5)
    np.testing.assert_array_equal(score, same)


def test_tasks_are_reported_each_or_by_their_mean(tmp_path):
    arrays = assays(tasks=model.FEW + 1)
    arrays["labels"][:, 3] = 0  # Never positive: it cannot be scored.
    molecules = data.load(Config(data=save(tmp_path, arrays)))
    scores = np.arange(model.FEW + 1.0)
    scores[3] = np.nan
    expected = np.nanmean(scores)
    assert model.metrics(molecules, scores) == {"mean": pytest.approx(expected)}
    few = data.load(Config(data=save(tmp_path, assays())))
    assert model.metrics(few, np.array([0.5, 0.6, 0.7])) == {
        "assay 0": 0.5,
        "assay 1": 0.6,
        "assay 2": 0.7,
    }


# Runs


def _checkpoint(folder, step):
    manager = ocp.StandardCheckpointer()
    return manager.restore((folder / "checkpoints" / str(step) / "default").absolute())


def test_a_run_on_patients_and_its_resumption_bit_for_bit(tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = [*TINY, "--steps", "4", "--eval-every", "2", "--method", "gradnorm"]
    results = train.main([*flags, "--out", str(whole)])
    assert "442 patients of scikit-learn, no molecules" in capsys.readouterr().out
    assert json.loads((whole / "results.json").read_text()) == results
    assert 0 < results["progression"] < 200 and 0 < results["mean"] < 2
    for name in ("curves.png", "tasks.png"):
        assert (whole / name).stat().st_size > 0
    rows = runs.read(whole / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert -1 <= rows[1]["cosine"] <= 1 and np.isnan(rows[0]["cosine"])
    assert rows[3]["valid_tc"] > 0 and np.isnan(rows[2]["valid_tc"])
    # As a kill after step 4 leaves it, before its checkpoint is written.
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "4")
    with pytest.raises(FileExistsError, match="continue it with --resume"):
        train.main([*flags, "--out", str(out)])
    again = train.main([*flags, "--out", str(out), "--resume"])
    assert (out / "log.csv").read_text() == (whole / "log.csv").read_text()
    jax.tree.map(
        np.testing.assert_array_equal, _checkpoint(out, 4), _checkpoint(whole, 4)
    )
    del again["rows_per_second"], results["rows_per_second"]
    assert again == results


def test_many_assays_and_the_plain_sum(tmp_path):
    file = save(tmp_path, assays(tasks=model.FEW + 1))
    flags = [*TINY, "--data", file, "--method", "sum", "--steps", "2"]
    results = train.main([*flags, "--out", str(tmp_path)])
    assert 0 < results["mean"] < 1
    rows = runs.read(tmp_path / "log.csv")
    assert rows[0].keys() == {"step", "loss", "cosine", "valid_mean"}
    assert rows[1]["valid_mean"] > 0


def test_a_race_of_properties(tmp_path):
    config = Config(data=save(tmp_path, quantum()), width=4, depth=1, batch_size=8)
    options = {"seeds": 2, "learning_rates": [1e-2], "weightings": 1}
    result = race.race(config, ["famo"], num_steps=3, **options, progress=False)
    assert result.methods == ("sum", "weighting 1", "famo")
    assert result.metrics == ("homo", "mu", "r2") and result.maximise == ()
    assert result.num_steps.tolist() == [3, 3, 3]
    assert result.values.shape == result.selection.shape == (3, 1, 2, 3)
    assert np.isfinite(result.values).all()
    # Errors in the units of the targets, on two splits.
    sizes = result.values.mean(axis=(0, 1, 2))
    assert (sizes < [0.1, 10, 3000]).all() and (sizes > [1e-3, 0.1, 30]).all()
    assert (result.values != result.selection).all()


def test_a_race_of_assays_is_printed_and_drawn(tmp_path, capsys):
    flags = [*TINY, "--data", save(tmp_path, assays()), "--steps", "2"]
    flags += ["--methods", "dwa", "--learning-rates", "1e-2", "--seeds", "2"]
    result = race.main([*flags, "--weightings", "0", "--out", str(tmp_path)])
    assert set(result.maximise) == {"assay 0", "assay 1", "assay 2"}
    assert ((result.values >= 0) & (result.values <= 1)).all()
    printed = capsys.readouterr().out
    assert "| `dwa` | 0.01 |" in printed and "chosen on a split of its own" in printed
    (figure,) = tmp_path.glob("race-*.png")
    assert figure.stat().st_size > 0


@pytest.mark.parametrize(
    "flag", ["--methods=pcgradd", "--seeds=0", "--widht=3", "--method=sum", "--resume"]
)
def test_flags_of_a_race(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        race.main([flag])
    assert ended.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


# Files


@pytest.mark.parametrize(
    "arrays, change, message",
    [
        (quantum, {"targets": None}, "expected charges, positions, targets, names, or"),
        (assays, {"scaffold": None}, "or fingerprints, labels, scaffold, tasks"),
        (quantum, {"names": np.array(["a", "b"])}, r"targets of shape \(N, 2\)"),
        (quantum, {"names": np.array(["a", "b", "a"])}, "different names in names"),
        (quantum, {"targets": np.full((60, 3), np.nan)}, "180 of 180 that are not"),
        (quantum, {"targets": np.full((60, 3), "1.0")}, "real numbers, found <U3"),
        (quantum, {"positions": np.full((60, 4, 3), np.nan)}, "finite positions"),
        (quantum, {"charges": np.full((60, 4), -1)}, "charges of 0 or more"),
        (quantum, {"charges": np.zeros((60, 4))}, "one above 0 in each molecule"),
        (quantum, {"names": np.array(["a", "step", "mean"])}, r"\['mean', 'step'\]"),
        (quantum, {"positions": np.zeros((60, 4, 2))}, "positions of shape"),
        (
            quantum,
            {"positions": np.zeros((60, 4, 3))},
            "two atoms of a molecule at one",
        ),
        (assays, {"labels": np.full((120, 3), 2)}, r"0, 1 and -1 .*found \[2\]"),
        (assays, {"labels": np.full((120, 3), np.nan)}, r"found \[nan\]"),
        (assays, {"labels": np.zeros((119, 3))}, r"of shape \(120, 3\)"),
        (assays, {"labels": np.zeros((120, 3))}, "no task has both labels"),
        (assays, {"fingerprints": np.zeros((120, 2))}, "in uint8, eight bits"),
        (assays, {"scaffold": np.zeros(3)}, "a scaffold for each of 120 molecules"),
        (assays, {"scaffold": np.zeros(120)}, r"leaves \[120, 0, 0\] rows"),
    ],
)
def test_files_that_are_something_else(arrays, change, message, tmp_path):
    whole = {k: v for k, v in (arrays() | change).items() if v is not None}
    config = config_lib.parse(["--data", save(tmp_path, whole)])
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=message):
        data.load(config)


def test_molecules_that_are_all_alike_have_finite_inputs(tmp_path):
    alike = quantum() | {"charges": np.tile(np.uint8([1, 0, 0, 0]), (60, 1))}
    molecules = data.load(config_lib.parse(["--data", save(tmp_path, alike)]))
    np.testing.assert_array_equal(molecules.train.inputs, 0)
