"""Settings of the quickstart; each field is a flag of train.py."""

import dataclasses

from examples import flags
from examples.flags import Number, setting, whole


@dataclasses.dataclass(frozen=True)
class Config:
    """Train one network on three tasks, with several methods beside the plain sum."""

    methods: tuple[str, ...] = setting(
        ("linear", "pcgrad", "cagrad", "upgrad", "mgda", "imtl_g", "nash_mtl"),
        "names in optax_mtl.METHODS; linear is the plain sum",
        flags.method(),
    )
    draw_weights: tuple[float, ...] = setting(
        (0.25, 2.0, 4.0),
        "of drawing, in sums tuned by hand",
        Number(float, least=0),
    )
    seeds: int = setting(3, "runs of each method", whole(1))
    steps: int = setting(600, "of training", whole(1))
    eval_every: int = setting(50, "steps between evaluations", whole(1))
    batch_size: int = setting(64, "canvases in a step", whole(2))
    test_size: int = setting(2000, "canvases to evaluate on", whole(2))
    learning_rate: float = setting(4e-3, "of AdamW", Number(float, above=0))
    features: int = setting(12, "of the trunk: few, so that tasks conflict", whole(1))
    data: str = setting(
        "", "FILE.npz with x_train, y_train, x_test, y_test; by default small digits"
    )
    out: str = setting("runs/quickstart", "folder of the figure")


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a :class:`Config` from the command line."""
    return flags.parse(Config, arguments, Config.__doc__ or "", check)


def check(config: Config) -> None:
    """Raises ValueError for settings that do not go together."""
    if not config.methods:
        raise ValueError("--methods: name at least one")
    if config.steps % config.eval_every:
        raise ValueError(
            f"--steps {config.steps} is not a multiple of --eval-every "
            f"{config.eval_every}: the last step would not be evaluated"
        )
