r"""Methods against the plain and the tuned sum: the tables of README.md.

    python -m examples.molecules.race --data qm9.npz
    python -m examples.molecules.race --data qm9.npz --no-standardise
    python -m examples.molecules.race --data tox21.npz --steps 200
    python -m examples.molecules.race --data toxcast.npz --steps 200 --no-conflicts \
        --methods uncertainty_weighting famo dwa

trains every method, the plain sum and static weightings of it with each learning rate
and seed, prints a table of scores on the test split and a verdict, and draws both.
Rates and weights are chosen on the validation split. Other flags are those of
examples.molecules.train.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

import optax_mtl
from examples import flags
from examples.flags import Number, run_program
from examples.molecules import config as config_lib
from examples.molecules import data, model
from examples.molecules.config import Config
from examples.progress import say
from optax_mtl import plots
from optax_mtl.comparison import Comparison

METHODS = ["upgrad", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad"]
METHODS += ["gradnorm", "famo", "uncertainty_weighting", "dwa"]


def main(argv: list[str] | None = None) -> Comparison:
    """Races, prints the table and the verdict, and writes the figure."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=form, allow_abbrev=False
    )
    rate = Number(float, above=0)
    rates = [1e-3, 3e-3, 1e-2]
    parser.add_argument("--methods", nargs="*", type=flags.method(), default=METHODS)
    parser.add_argument("--learning-rates", nargs="+", type=rate, default=rates)
    parser.add_argument("--seeds", type=flags.whole(1), default=3)
    parser.add_argument("--weightings", type=flags.whole(0), default=8)
    parser.add_argument("--single-task", action="store_true")
    parser.add_argument("--no-conflicts", dest="conflicts", action="store_false")
    arguments, others = parser.parse_known_args(argv)
    config = config_lib.parse(others)
    for name in ("method", "learning_rate", "seed", "resume", "eval_every"):
        if getattr(config, name) != getattr(Config(), name):
            parser.error(
                f"--{name.replace('_', '-')} is of a single run, not of a race"
            )
    options = vars(arguments)
    result = race(config, options.pop("methods"), **options)
    say(result.table())
    say(result.verdict())
    name = pathlib.Path(config.data).stem or "patients"
    draw(result, pathlib.Path(config.out) / f"race-{name}.png")
    return result


def draw(result: Comparison, file: pathlib.Path) -> None:
    """The figure of a comparison, with its legend beside it."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    plots.compare(result, axes)
    if axes[0].get_legend() is not None:
        axes[0].get_legend().remove()
    entries = axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside right center", fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def race(config: Config, methods: Sequence[str], **options: Any) -> Comparison:
    """Races methods on the data of a configuration.

    Args:
      config: the data, the model, the batches and the number of steps; its method,
        learning rate and seed are not read.
      methods: names of the catalog.
      **options: of :func:`optax_mtl.compare`.

    Returns:
      The comparison: scores on the test split, chosen on the validation split. The
      mean absolute error of each property in its unit, or ROC-AUC of each assay; of
      more than :data:`model.FEW` tasks the mean.
    """
    molecules = data.load(config)
    say(molecules.about)
    problem = model.make_problem(config, molecules)
    train, valid, test = (jax.device_put(rows) for rows in molecules[1:4])
    on = lambda rows: (
        lambda params: model.metrics(molecules, problem.scores(params, rows))
    )
    names = list(
        jax.eval_shape(lambda key: on(test)(problem.init(key)), jax.random.key(0))
    )
    num_steps = options.pop("num_steps", config.steps)
    defaults = {
        "optimizer": model.make_optimizer(num_steps),
        "evaluate": on(test),
        "select": on(valid),
        "maximise": names if molecules.spread is None else (),
        "shared": model.shared,
    }
    return optax_mtl.compare(
        problem.losses,
        problem.init,
        lambda key, step: data.draw(train, key, step, config.batch_size),
        methods,
        num_steps=num_steps,
        **(defaults | options),
    )


if __name__ == "__main__":
    run_program(main)
