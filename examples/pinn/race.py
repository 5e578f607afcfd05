"""Races methods against the plain and the tuned sum on one of the problems.

python -m examples.pinn.race --problem burgers
python -m examples.pinn.race --problem kovasznay --methods upgrad mgda --seeds 5
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_mtl
from examples import flags
from examples.flags import Number, run_program, setting, whole
from examples.pinn import model, problems
from examples.pinn.config import Setup
from examples.progress import say
from optax_mtl import plots
from optax_mtl.comparison import Comparison

Method = Callable[[int], optax.GradientTransformation]  # Of the number of tasks.
METHODS: tuple[str, ...] = ("upgrad", "config", "imtl_g", "nash_mtl", "pcgrad")
METHODS += ("gradnorm", "uncertainty_weighting")
RATES = (3e-3, 1e-2, 3e-2)


@dataclasses.dataclass(frozen=True)
class Race(Setup):
    """Methods against the plain sum and the tuned sum, at equal steps."""

    methods: tuple[str, ...] = setting(
        METHODS, "names in optax_mtl.METHODS", flags.method()
    )
    boundary_weights: tuple[float, ...] = setting(
        (),
        "more sums, with these weights of the losses on the sides",
        Number(float, above=0),
    )
    learning_rates: tuple[float, ...] = setting(
        RATES, "of Adam, each tried with every row", Number(float, above=0)
    )
    seeds: int = setting(3, "of each row at each rate", whole(1))
    weightings: int = setting(8, "static ones of the tuned sum", whole(0))


def race(
    config: Setup, methods: Sequence[str] | Mapping[str, Method], **options: Any
) -> Comparison:
    """Races methods on the problem of a configuration.

    The metrics are the relative errors of the outputs on one half of the grid, every
    second point of it as on a chessboard; rates and weights are chosen on the other.

    Args:
      config: problem, points, size of the network and steps.
      methods: names in `optax_mtl.METHODS`, or as :func:`optax_mtl.compare` takes them.
      options: of :func:`optax_mtl.compare`, in the place of those chosen here. With
        `update_budget="flops"` give an `optimizer` of a constant rate, for that of the
        example counts on `num_steps`; with `select=None` further seeds select.
    """
    num_steps = options.pop("num_steps", config.steps)
    config = dataclasses.replace(config, steps=num_steps)
    functions = model.make(config)
    problem = problems.PROBLEMS[config.problem]
    grid, (rows, columns) = problems.make_grid(problem), np.indices(problem.grid)
    reported = (rows + columns).reshape(-1) % 2 == 0
    chosen = {
        "optimizer": functions.optimizer,
        "learning_rates": RATES,
        "num_steps": num_steps,
        "evaluate": model.errors(config, functions, grid[reported]),
        "select": model.errors(config, functions, grid[~reported]),
    }
    return optax_mtl.compare(
        functions.losses, functions.init, functions.draw, methods, **chosen | options
    )


def weightings_saved(result: Comparison) -> list[str]:
    """For each method, how many static weightings have to be tried to do as well."""
    change = result.delta_m().mean(axis=1)
    lines = []
    for row in result.racers():
        needed = result.weightings_to_match(row)
        if not np.isfinite(change[0]):
            words = "no saying, since the plain sum diverged"
        elif not change[row] < 0:
            words = "no better than the plain sum"
        elif needed is not None:
            words = f"as good as the best of the plain sum and {needed} others"
        else:
            count = len(result.weightings) - 1
            words = f"better than the plain sum and {count} others"
        lines.append(f"{result.methods[row]}: {words}")
    return lines


def main(arguments: list[str] | None = None) -> Comparison:
    """Prints the table and the verdict, and draws the race."""
    settings = flags.parse(Race, arguments, Race.__doc__ or "", check)
    methods: dict[str, Method] = {
        name: functools.partial(optax_mtl.get, name) for name in settings.methods
    }
    problem = problems.PROBLEMS[settings.problem]
    for weight in settings.boundary_weights:
        methods[f"sides x {weight:g}"] = _weighted_sum(problem.weights(weight))
    result = race(
        settings,
        methods,
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        weightings=settings.weightings,
    )
    say(f"{result.table()}\n\n{result.verdict()}\n")
    if settings.weightings:
        say("\n".join(weightings_saved(result)))
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    plots.compare(result, axes[:3])
    _plot_tuning(result, axes[3])
    figure.suptitle(settings.problem)
    file = pathlib.Path(settings.out) / f"race-{settings.problem}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    say(f"figure: {file}")
    return result


def _weighted_sum(weights: dict[str, float]) -> Method:
    return lambda num_tasks: optax_mtl.linear(weights)


def _plot_tuning(result, axis):
    """What trying static weightings comes to, and the methods as lines."""
    best, change = result.tuning_curve(), result.delta_m().mean(axis=1)
    axis.plot(best, "o-", color="0.5", label="tuned sum")
    for number, row in enumerate(result.racers()):
        if change[row] < 0:  # No worse than the plain sum.
            color = plots.COLOURS[number % len(plots.COLOURS)]
            axis.axhline(change[row], color=color, label=result.methods[row])
    axis.set(xlabel="weightings tried beside the sum", ylabel="Δm %", ylim=(-100, 3))
    axis.legend(fontsize="x-small")


def check(settings: Race) -> None:
    """Raises ValueError for settings that do not go together."""
    if not settings.learning_rates:
        raise ValueError("--learning-rates: give at least one")


if __name__ == "__main__":
    run_program(main)
