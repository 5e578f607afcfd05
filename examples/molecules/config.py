"""Everything that can be set, with its default; each field is a command-line flag."""

import dataclasses

from examples import flags
from examples.flags import Number, setting, whole


@dataclasses.dataclass(frozen=True)
class Config:
    """Many properties of a molecule from one network. Defaults suit one CPU core."""

    # What to run.
    method: str = setting(
        "upgrad", "sum, or a name in optax_mtl.METHODS", flags.method("sum")
    )
    seed: int = setting(0, "of the weights and the batches", whole(0))
    out: str = setting("runs/molecules", "folder of logs, figures and checkpoints")
    resume: bool = setting(False, "continue the run in --out")

    # Data: patients of scikit-learn's diabetes study, no molecules, or a file.
    data: str = setting(
        "",
        "FILE.npz with charges, positions, targets, names (as QM9) or fingerprints, "
        "labels, scaffold, tasks (as Tox21); by default patients",
    )
    standardise: bool = setting(
        True,
        "targets, so that the losses have no units; otherwise in those of the data",
    )
    held_out: float = setting(
        0.15,
        "share of the rows to validate on, and to test on",
        Number(float, above=0, below=0.5),
    )
    split_seed: int = setting(0, "of the split", whole(0))

    # Model.
    width: int = setting(128, "features of a layer of the trunk", whole(1))
    depth: int = setting(2, "layers of the trunk", whole(1))

    # Optimization.
    batch_size: int = setting(128, "rows in a step", whole(1))
    steps: int = setting(1000, "of training", whole(1))
    learning_rate: float = setting(
        3e-3, "of Adam, at the start; at the end 0", Number(float, above=0)
    )

    # Reports.
    eval_every: int = setting(100, "steps between evaluations, checkpoints", whole(1))


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a :class:`Config` from the command line."""
    return flags.parse(Config, arguments, Config.__doc__ or "")
