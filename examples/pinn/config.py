"""Everything that can be set, with its default; each field is a command-line flag."""

import dataclasses

import optax_mtl
from examples import flags
from examples.flags import Number, setting, whole
from examples.pinn.problems import PROBLEMS

MODES = ("auto", "stacked", "leafwise", "gram")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training run and a race have in common."""

    problem: str = setting("burgers", "the equations", choices=tuple(PROBLEMS))
    points: int = setting(64, "inside, drawn anew in each step", whole(1))
    side_points: int = setting(16, "on each side, drawn anew, too", whole(1))
    width: int = setting(32, "of the network's layers", whole(1))
    depth: int = setting(3, "its hidden layers", whole(1))
    steps: int = setting(6000, "of training", whole(1))
    out: str = setting("runs/pinn", "folder of logs, figures and checkpoints")


@dataclasses.dataclass(frozen=True)
class Config(Setup):
    """A physics-informed network with one loss for each equation and condition."""

    method: str = setting(
        "upgrad", "sum, or a name in optax_mtl.METHODS", flags.method("sum")
    )
    mode: str = setting("auto", "how gradients are had", choices=MODES)
    boundary_weight: float = setting(
        1.0, "of the losses on the sides, by hand", Number(float, above=0)
    )
    learning_rate: float = setting(
        1e-2, "of Adam at the start; a cosine takes it to 0", Number(float, above=0)
    )
    seed: int = setting(0, "of the weights and the points", whole(0))
    eval_every: int = setting(200, "steps between evaluations, checkpoints", whole(1))
    resume: bool = setting(False, "continue the run in --out")


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a :class:`Config` from the command line."""
    return flags.parse(Config, arguments, Config.__doc__ or "", check)


def check(config: Config) -> None:
    """Raises ValueError for settings that do not go together."""
    if config.method == "sum" or config.mode in ("auto", "stacked"):
        return
    if "gradients" in optax_mtl.METHODS[config.method].reads:
        raise ValueError(
            f"--mode {config.mode} does not hold the gradients of all tasks, which "
            f"--method {config.method} reads: take auto or stacked"
        )
