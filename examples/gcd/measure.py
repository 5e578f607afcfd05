"""The tables of README.md: every method at several learning rates, and its cost.

    python -m examples.gcd.measure --results results.csv --only mnist
    python -m examples.gcd.measure --results results.csv --from-pixels --only digits
    python -m examples.gcd.measure --overhead

With a pretrained backbone, one for each data set, the rate of each method is chosen
with a seed that is not reported. Runs that the results file already has are not
repeated.
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
CHARACTERS = "--preset lenet --warp 1 --strokes 1"
SAVE = "--save-every 100 --diagnose-steps 100 --soc-every 50 --trainable last"
PRETRAINED = {  # Flags of the data, of pretraining and of the rest.
    "digits": (
        CHARACTERS,
        "--pretrain-epochs 100",
        f"{SAVE} --reference-epochs 5 --epochs 40 --teacher-warmup-epochs 15",
    ),
    "mnist": (
        f"{CHARACTERS} --data {{folder}}/mnist.npz --max-images 10000",
        "--pretrain-epochs 30",
        f"{SAVE} --reference-epochs 1 --epochs 8 --teacher-warmup-epochs 3",
    ),
    "omniglot_small1": (
        f"{CHARACTERS} --data {{folder}}/omniglot_small1.npz",
        "--pretrain-epochs 80",
        f"{SAVE} --reference-epochs 10 --epochs 30 --teacher-warmup-epochs 10",
    ),
    "clothing64": (
        "--preset lenet --warp 1 --flip --jitter 0.4 --image-size 32 "
        "--data {folder}/clothing64.npz",
        "--pretrain-epochs 40",
        f"{SAVE} --reference-epochs 2 --epochs 12 --teacher-warmup-epochs 4",
    ),
}
SHORT_LIST = ["sum", "aga", "eep", "eagc", "pcgrad", "cagrad", "upgrad"]
PRETRAINED_RATES = [0.3, 0.1, 0.03]  # Of the heads; of the backbone 0.3 of it.
SELECTION = 100  # Seed with which the rate is chosen.
DATA = {  # From pixels: flags and number of seeds.
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
    parser.add_argument("--folder", default="data", help="of the npz files")
    parser.add_argument("--from-pixels", action="store_true", help="no pretraining")
    parser.add_argument("--overhead", action="store_true")
    arguments = parser.parse_args()
    if arguments.overhead:
        for title, (flags, rounds) in OVERHEAD.items():
            print(f"\n{title}")
            print_overhead(flags, rounds)
        return
    for name in arguments.only:
        table = _from_pixels if arguments.from_pixels else _pretrained
        table(arguments.results, name, arguments.folder)


def _from_pixels(results, name, folder):
    flags, num_seeds = DATA[name]
    flags = flags.format(folder=folder)
    for method, rate in itertools.product(METHODS, RATES):
        for seed in range(num_seeds):  # Together: they share a compilation.
            rates = f"--lr {rate} --backbone-lr {rate}"
            measure(results, name, method, rate, seed, f"{flags} {rates}")
        jax.clear_caches()  # Compiled programs use up the process's memory maps.
    print_table(results, name)


def _pretrained(results, name, folder):
    data, pretraining, flags = (x.format(folder=folder) for x in PRETRAINED[name])
    out = results.with_name(f"pretrained_{name}")
    if not (out / "pretrained.npz").exists():
        train.main(
            f"{data} --pretrain ssl {pretraining} --reference-epochs 0 --epochs 1 "
            f"--diagnose-steps 0 --method sum --out {out} --resume".split()
        )
    flags = f"{data} {flags} --backbone-weights {out}/pretrained.npz"
    title = f"{name}, pretrained"
    for method in SHORT_LIST:
        for rate in PRETRAINED_RATES:
            rates = f"--lr {rate} --backbone-lr {0.3 * rate}"
            measure(results, title, method, rate, SELECTION, f"{flags} {rates}")
        rate = chosen_rate(results, title, method)
        rates = f"--lr {rate} --backbone-lr {0.3 * rate}"
        for seed in range(3):
            measure(results, title, method, rate, seed, f"{flags} {rates}")
        jax.clear_caches()
    print(f"\n{chosen_table(results, title)}")


def measure(
    results: pathlib.Path, name: str, method: str, rate: float, seed: int, flags: str
) -> None:
    """One run, as a row of the results file."""
    run = {"data": name, "method": method, "rate": str(rate), "seed": str(seed)}
    rows = read(results)
    if any(row.items() >= run.items() for row in rows):
        return
    with tempfile.TemporaryDirectory() as out:
        command = f"{flags} --method {method} --seed {seed} --out {out}"
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


def chosen_rate(results: pathlib.Path, title: str, method: str) -> float:
    """The rate with the highest accuracy of the seed that is not reported."""
    rows = [row for row in read(results) if row["seed"] == str(SELECTION)]
    rows = [row for row in rows if (row["data"], row["method"]) == (title, method)]
    return float(max(rows, key=lambda row: float(row["all"]))["rate"])


def chosen_table(results: pathlib.Path, title: str) -> str:
    """At the chosen rates: mean and standard deviation over seeds, in Markdown."""
    heads = [title, "rate", "All", "All - sum", "Old", "New", "GDC", "SOC"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = [row for row in read(results) if row["data"] == title]
    rows = [row for row in rows if row["seed"] != str(SELECTION)]
    for method in SHORT_LIST:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        against = [
            row | {"all": float(row["all"]) - float(other["all"])}
            for row, other in zip(own, (row for row in rows if row["method"] == "sum"))
        ]
        cells = [own[0]["rate"], _cell(own, "all"), _cell(against, "all")]
        cells += [_cell(own, metric) for metric in METRICS[1:]]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


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
