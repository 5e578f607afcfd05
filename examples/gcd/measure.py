"""The tables of README.md: every method at several learning rates, and its cost.

    python -m examples.gcd.measure --results results.csv --only digits
    python -m examples.gcd.measure --overhead

Runs that the results file already has are not repeated.
"""

import argparse
import csv
import io
import itertools
import pathlib
import statistics
import tempfile
import time

import jax
from flax import nnx

from examples import runs
from examples.flags import run_program
from examples.gcd import train
from examples.gcd.config import parse

RATES = [0.1, 0.05, 0.025, 0.0125]
METRICS = ["all", "old", "new", "gdc", "soc"]
METHODS = ["sum", "aga", "eep", "eagc", "pcgrad", "cagrad", "upgrad", "gcond"]
METHODS += ["energy_gate"]
SHORT = "--preset mlp --epochs 40 --batch-size 64 --teacher-warmup-epochs 20"
SHORT += " --save-every 40"
DATA = {  # Flags and number of seeds.
    "digits": (SHORT, 5),
    "mnist": (f"{SHORT} --data {{folder}}/mnist.npz --max-images 1500", 3),
    "omniglot_small1": (
        f"{SHORT} --data {{folder}}/omniglot_small1.npz --max-classes 40 "
        "--reference-epochs 150",  # With 30 it learns nothing from 200 images.
        3,
    ),
    "clothing64": (
        f"{SHORT} --data {{folder}}/clothing64.npz --max-images 1500 --flip "
        "--image-size 28",
        3,
    ),
}

OVERHEAD = {  # Flags, and how many steps are timed.
    "tiny ViT, everything trains": ("", 60),
    "12 blocks (ViT-S), the last one trains": (
        "--preset vit_s16 --trainable last --image-size 32 --batch-size 16",
        20,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default="results.csv")
    parser.add_argument("--only", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--folder", default="data", help="of the npz files")
    parser.add_argument("--overhead", action="store_true")
    arguments = parser.parse_args()
    if arguments.overhead:
        for title, (flags, rounds) in OVERHEAD.items():
            print(f"\n{title}")
            print_overhead(flags, rounds)
        return
    grid = itertools.product(arguments.only, arguments.methods, arguments.rates)
    for name, method, rate in grid:
        flags, num_seeds = DATA[name]
        flags = flags.format(folder=arguments.folder)
        for seed in range(num_seeds):  # Together: they share a compilation.
            measure(arguments.results, name, method, rate, seed, flags)
        jax.clear_caches()  # Compiled programs use up the process's memory maps.
    for name in arguments.only:
        print_table(arguments.results, name)


def measure(
    results: pathlib.Path, name: str, method: str, rate: float, seed: int, flags: str
) -> None:
    """One run, as a row of the results file."""
    run = {"data": name, "method": method, "rate": str(rate), "seed": str(seed)}
    rows = read(results)
    if any(row.items() >= run.items() for row in rows):
        return
    with tempfile.TemporaryDirectory() as out:
        rates = f"--lr {rate} --backbone-lr {rate}"
        command = f"{flags} {rates} --method {method} --seed {seed} --out {out}"
        result = train.main(command.split())
    text = io.StringIO()
    writer = csv.DictWriter(text, [*run, *METRICS])
    writer.writeheader()
    writer.writerows([*rows, run | result])
    runs.replace(results, text.getvalue())


def read(results: pathlib.Path) -> list[dict[str, str]]:
    """Rows of the results file; none if it does not exist yet."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table(results: pathlib.Path, name: str) -> None:
    """Mean and standard deviation over seeds, in Markdown.

    Accuracy at each rate; the other columns are at the rate that is best for All.
    """
    rows = [row for row in read(results) if row["data"] == name]
    rates = sorted({row["rate"] for row in rows}, key=float, reverse=True)
    heads = [f"All at {rate}" for rate in rates] + ["Old", "New", "GDC", "SOC"]
    print(f"\n| {' | '.join([name, *heads])} |")
    print("|---" * (1 + len(heads)) + "|")
    for method in dict.fromkeys(row["method"] for row in rows):
        by_rate = {
            rate: [
                row for row in rows if (row["method"], row["rate"]) == (method, rate)
            ]
            for rate in rates
        }
        best = max(rates, key=lambda rate: _mean(by_rate[rate], "all"))
        cells = [_cell(by_rate[rate], "all") for rate in rates]
        cells += [_cell(by_rate[best], metric) for metric in METRICS[1:]]
        print(f"| {' | '.join([method, *cells])} |")


def _mean(rows, metric):
    return statistics.fmean(float(row[metric]) for row in rows) if rows else 0.0


def _cell(rows, metric):
    if len(rows) < 2:
        return ""
    mean = _mean(rows, metric)
    spread = statistics.stdev(float(row[metric]) for row in rows)
    if metric in ("gdc", "soc"):
        return f"{mean:.3f} ± {spread:.3f}"
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def print_overhead(flags: str, rounds: int) -> None:
    """Time of a step relative to the plain sum's, in turns within one process."""
    calls = {}
    for method in "sum", "eep", "eagc":
        config = parse([*flags.split(), "--method", method])
        split, images = train.prepare(config)
        backbone = nnx.state(train.make_reference(config, split).backbone)
        experiment = train.make_experiment(config, split)
        state, frozen = train.start(config, experiment, split, backbone)
        calls[method] = _stepper(experiment.step, state, frozen, images)
    views = images.images[: 2 * config.batch_size]
    calls["reference alone"] = lambda: experiment.before(
        frozen.reference, frozen.rest, views
    )

    times = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if number >= 3:  # After compilation.
                times[name].append(time.perf_counter() - started)
    print(f"{len(views)} rows, {jax.devices()[0].platform}")
    for name, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times["sum"])]
        print(
            f"{name}: {1e3 * statistics.median(values):.1f} ms, "
            f"{statistics.median(ratios):.3f} of the plain sum's"
        )


def _stepper(step, state, frozen, images):
    """A function without arguments that makes the next step of a run."""

    def call():
        nonlocal state
        state, metrics = step(state, frozen, images)
        return state, metrics

    return call


if __name__ == "__main__":
    run_program(main)
