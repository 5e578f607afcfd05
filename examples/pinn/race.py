"""Races methods against the plain and the tuned sum on one of the problems.

python -m examples.pinn.race --problem burgers
python -m examples.pinn.race --problem kovasznay --methods upgrad mgda --seeds 5
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

import optax_mtl
from examples import flags
from examples.flags import Number, run_program, setting, whole
from examples.pinn import model, problems
from examples.pinn.config import Setup
from examples.progress import say
from optax_mtl import plots
from optax_mtl.comparison import Comparison

METHODS = ("upgrad", "config", "imtl_g", "nash_mtl", "pcgrad", "gradnorm")
METHODS += ("uncertainty_weighting",)
RATES = (3e-3, 1e-2, 3e-2)


@dataclasses.dataclass(frozen=True)
class Race(Setup):
    """Methods against the plain sum and the tuned sum, at equal steps."""

    methods: tuple[str, ...] = setting(
        METHODS, "names in optax_mtl.METHODS", flags.method()
    )
    learning_rates: tuple[float, ...] = setting(
        RATES, "of Adam, each tried with every row", Number(float, above=0)
    )
    seeds: int = setting(3, "of each row at each rate", whole(1))
    weightings: int = setting(8, "static ones of the tuned sum", whole(0))


def race(config: Setup, methods: Sequence[str], **options) -> Comparison:
    """Races methods on the problem of a configuration.

    The metrics are the relative errors of the outputs on one half of the grid, every
    second point of it as on a chessboard; rates and weights are chosen on the other.

    Args:
      config: problem, points, size of the network and steps.
      methods: names in `optax_mtl.METHODS`.
      options: of :func:`optax_mtl.compare`, in the place of those chosen here. With
        `update_budget="flops"` give an `optimizer` of a constant rate, for that of the
        example counts on `config.steps`; with `select=None` further seeds select.
    """
    functions = model.make(config)
    rows, columns = np.indices(problems.PROBLEMS[config.problem].grid)
    reported = (rows + columns).reshape(-1) % 2 == 0
    grid = problems.make_grid(problems.PROBLEMS[config.problem])
    chosen = {
        "optimizer": functions.optimizer,
        "learning_rates": RATES,
        "num_steps": config.steps,
        "evaluate": model.errors(config, functions, grid[reported]),
        "select": model.errors(config, functions, grid[~reported]),
    }
    return optax_mtl.compare(
        functions.losses, functions.init, functions.draw, methods, **chosen | options
    )


def main(arguments: list[str] | None = None) -> Comparison:
    """Prints the table and the verdict, and draws the race."""
    settings = flags.parse(Race, arguments, Race.__doc__ or "", check)
    result = race(
        settings,
        settings.methods,
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        weightings=settings.weightings,
    )
    say(f"{result.table()}\n\n{result.verdict()}")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    plots.compare(result, axes)
    figure.suptitle(settings.problem)
    file = pathlib.Path(settings.out) / f"race-{settings.problem}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    say(f"figure: {file}")
    return result


def check(settings: Race) -> None:
    """Raises ValueError for settings that do not go together."""
    if not settings.learning_rates:
        raise ValueError("--learning-rates: give at least one")


if __name__ == "__main__":
    run_program(main)
