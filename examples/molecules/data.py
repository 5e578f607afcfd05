"""Molecules from files, each told by its arrays; patients without a file."""

from typing import NamedTuple

import jax
import numpy as np

from examples import arrays
from examples.flags import UserError
from examples.molecules.config import Config

BOHR = 0.529177  # In angstrom.
QUANTUM = ("charges", "positions", "targets", "names")  # Arrays of a file as QM9.
ASSAYS = ("fingerprints", "labels", "scaffold", "tasks")  # Of one as Tox21.
RESERVED = {"step", "cosine", "mean", "rows_per_second"}  # In logs and results.


class Rows(NamedTuple):
    """Examples, one a row, with a column for each task in the last two."""

    inputs: np.ndarray | jax.Array  # Shape `(n, features)`.
    targets: np.ndarray | jax.Array  # Standardised, or labels; 0 where missing.
    mask: np.ndarray | jax.Array  # 1 where there is a target, otherwise 0.


class Molecules(NamedTuple):
    """Three splits of a data set."""

    tasks: list[str]
    train: Rows
    valid: Rows
    test: Rows
    spread: np.ndarray | None  # Of each target in training; None for labels.
    about: str  # What this is, for the log.

    def scored(self) -> np.ndarray:
        """Which tasks can be scored: those with both labels where they are needed."""
        if self.spread is not None:
            return np.ones(len(self.tasks), bool)
        found = [
            (rows.mask * (rows.targets == label)).any(axis=0)
            for rows in (self.valid, self.test)
            for label in (0, 1)
        ]
        return np.logical_and.reduce(found)


def load(config: Config) -> Molecules:
    """Loads the data that the configuration asks for, and splits them."""
    molecules = _read(config) if config.data else _patients(config)
    counts = [len(rows.inputs) for rows in molecules[1:4]]
    if not all(counts):
        raise UserError(
            f"--held-out {config.held_out} leaves {counts} rows to train, validate and"
            " test on"
        )
    if not molecules.scored().any():
        raise UserError(
            f"--data {config.data}: no task has both labels to validate and to test on"
        )
    return molecules


def draw(rows: Rows, key: jax.Array, step: jax.Array | int, size: int) -> Rows:
    """The batch of a step: a function of key and step, so that runs resume."""
    key = jax.random.fold_in(key, step)
    chosen = jax.random.randint(key, (size,), 0, len(rows.inputs))
    return Rows(*(x[chosen] for x in rows))


def coulomb(charges: np.ndarray, positions: np.ndarray) -> np.ndarray:
    r"""Sorted Coulomb matrices, of which the upper triangles are the features.

    .. math::

      C_{ii} = 0.5 Z_i^{2.4}, \quad C_{ij} = \frac{Z_i Z_j}{|R_i - R_j|},

    with rows and columns in the order of the norms of the rows, the largest first:
    neither rotations nor the order of the atoms matter, unless two norms are equal.

    Args:
      charges: of the nuclei, 0 where there is no atom, shape `(n, atoms)`.
      positions: in angstrom, shape `(n, atoms, 3)`.

    Returns:
      Shape `(n, atoms * (atoms + 1) / 2)`, float32.

    References:
      Rupp et al, `Fast and Accurate Modeling of Molecular Atomization Energies with
      Machine Learning <https://arxiv.org/abs/1109.2618>`_, 2012
    """
    upper = np.triu_indices(charges.shape[1])
    parts = max(1, len(charges) // 1000)  # What lies between is large.
    found = []
    for z, r in zip(np.array_split(charges, parts), np.array_split(positions, parts)):
        z, r = z.astype(float), r.astype(float) / BOHR
        distances = np.linalg.norm(r[:, :, None] - r[:, None], axis=-1)
        products = z[:, :, None] * z[:, None]
        # No atom is near to one that is not there, nor to itself.
        apart = (products > 0) & ~np.eye(z.shape[1], dtype=bool)
        matrix = np.divide(
            products, distances, where=apart, out=np.zeros_like(products)
        )
        matrix += np.einsum("ni,ij->nij", 0.5 * z**2.4, np.eye(z.shape[1]))
        order = np.argsort(-np.linalg.norm(matrix, axis=-1), axis=-1)
        matrix = np.take_along_axis(matrix, order[:, :, None], axis=1)
        matrix = np.take_along_axis(matrix, order[:, None], axis=2)
        found.append(matrix[:, *upper].astype(np.float32))
    return np.concatenate(found)


def split_groups(groups: np.ndarray, config: Config) -> tuple[np.ndarray, ...]:
    """Rows to train, validate and test on; what is of one group stays together.

    Groups that would fill half of a held-out part are trained on, as is common; the
    others are dealt out in random order.
    """
    rng = np.random.default_rng(config.split_seed)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    size = config.held_out * len(groups)
    small = rng.permutation(np.flatnonzero(2 * sizes <= max(size, 2)))
    ends = np.cumsum(sizes[small])
    part = np.zeros(len(sizes), int)
    part[small] = np.where(ends <= size, 1, np.where(ends <= 2 * size, 2, 0))
    return tuple(np.flatnonzero(part[group] == i) for i in range(3))


def _patients(config):
    """Blood values and the course of diabetes, from four simple measurements."""
    from sklearn.datasets import load_diabetes

    study = load_diabetes(scaled=False)
    tasks = ["tc", "ldl", "hdl", "tch", "ltg", "glu", "progression"]
    targets = np.column_stack([study.data[:, 4:], study.target])
    about = f"no --data: {len(targets)} patients of scikit-learn, no molecules"
    parts = split_groups(np.arange(len(targets)), config)
    inputs = study.data[:, :4]
    scale = inputs[parts[0]].std(axis=0)
    return _regression(inputs, scale, targets, tasks, parts, about)


def _read(config):
    """A file, told by its arrays."""
    found = arrays.load("--data", config.data)
    known = [names for names in (QUANTUM, ASSAYS) if set(names) <= found.keys()]
    if not known:
        raise UserError(
            f"--data {config.data} has {sorted(found)}: expected {', '.join(QUANTUM)},"
            f" or {', '.join(ASSAYS)}"
        )
    *fields, tasks = (found[name] for name in known[0])
    _check(
        config,
        tasks.ndim == 1 and 0 < len(np.unique(tasks)) == len(tasks),
        f"different names in {known[0][-1]}",
        f"{tasks}",
    )
    taken = sorted(RESERVED & set(map(str, tasks)))
    _check(config, not taken, "names that no column of the logs has", f"{taken}")
    read = _quantum if known[0] == QUANTUM else _assays
    return read(config, *fields, [str(task) for task in tasks])


def _quantum(config, charges, positions, targets, names):
    shape = charges.shape
    _check(
        config,
        charges.ndim == 2 and positions.shape == (*shape, 3),
        "charges of shape (N, atoms) and positions of shape (N, atoms, 3)",
        f"{shape} and {positions.shape}",
    )
    _check(
        config,
        targets.shape == (shape[0], len(names)),
        f"targets of shape (N, {len(names)}), as many as names",
        f"shape {targets.shape}",
    )
    numbers = {"charges": charges, "positions": positions, "targets": targets}
    for name, x in numbers.items():
        real = x.dtype.kind in "biuf"
        _check(config, real, f"{name} that are real numbers", f"{x.dtype}")
        missing = f"{(~np.isfinite(x)).sum()} of {x.size} that are not"
        _check(config, np.isfinite(x).all(), f"finite {name}", missing)
    _check(
        config,
        (charges >= 0).all() and charges.any(axis=1).all(),
        "charges of 0 or more, and one above 0 in each molecule",
        "others",
    )
    with np.errstate(divide="ignore"):
        features = coulomb(charges, positions)
    if not np.isfinite(features).all():
        raise UserError(f"--data {config.data}: two atoms of a molecule at one place")
    about = f"{config.data}: {len(targets)} molecules by their Coulomb matrices"
    parts = split_groups(np.arange(len(targets)), config)
    # One for all entries: with one for each, those of an atom that few molecules have
    # would be outliers, which drown the others.
    scale = np.sqrt(features[parts[0]].var(axis=0).mean())
    return _regression(features, scale, targets, names, parts, about)


def _assays(config, fingerprints, labels, scaffold, tasks):
    _check(
        config,
        fingerprints.dtype == np.uint8 and fingerprints.ndim == 2,
        "fingerprints in uint8, eight bits each, of shape (N, bytes)",
        f"{fingerprints.dtype} {fingerprints.shape}",
    )
    count = len(fingerprints)
    _check(
        config,
        labels.shape == (count, len(tasks)),
        f"labels of shape ({count}, {len(tasks)})",
        f"shape {labels.shape}",
    )
    others = np.setdiff1d(labels, (-1, 0, 1))
    _check(config, not others.size, "labels of 0, 1 and -1 (missing)", f"{others[:5]}")
    _check(
        config,
        scaffold.shape == (count,),
        f"one number of a scaffold for each of {count} molecules",
        f"shape {scaffold.shape}",
    )
    inputs = np.unpackbits(fingerprints, axis=1)
    targets, mask = (np.float32(labels == 1), np.float32(labels >= 0))
    rows = [
        Rows(inputs[i], targets[i], mask[i]) for i in split_groups(scaffold, config)
    ]
    about = f"{config.data}: {count} molecules by their fingerprints"
    return Molecules(tasks, *rows, None, about)


def _regression(inputs, scale, targets, tasks, parts, about):
    """Inputs over a scale and standardised targets, centred by what is trained on."""
    train = parts[0]
    spread = targets[train].std(axis=0)
    spread, scale = (np.where(x > 0, x, 1) for x in (spread, scale))
    inputs = np.float32((inputs - inputs[train].mean(axis=0)) / scale)
    targets = np.float32((targets - targets[train].mean(axis=0)) / spread)
    rows = [Rows(inputs[i], targets[i], np.ones_like(targets[i])) for i in parts]
    return Molecules(tasks, *rows, np.float32(spread), about)


def _check(config, right, expected, found):
    if not right:
        raise UserError(f"--data {config.data}: expected {expected}, found {found}")
