"""The tables of README.md: each way to resolve, with the same search of its rate.

    python -m examples.ssl.measure --data clothing64.npz
    python -m examples.ssl.measure --data clothing64.npz --out runs/ssl-large \
        --flags="--batch-size 256 --micro-batches 8"

makes for each row one run at each learning rate, then one with each of three more
seeds at the rate with the smallest validation loss; with `--figure`, the differences
are also drawn. Each run has its own folder; finished runs are not repeated, and an
interrupted one goes on.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics

from examples import runs
from examples.flags import run_program
from examples.ssl import config as config_lib
from examples.ssl import data, report, train
from examples.ssl.config import Config

ROWS = {  # Flags of each.
    "sum, AdamW's own momentum": "--method sum --momentum 0",
    "sum, momentum before AdamW": "--method sum",
    "PCGrad, exact": "--method pcgrad --mode exact",
    "CAGrad, exact": "--method cagrad --mode exact",
    "GradNorm, exact": "--method gradnorm --mode exact",
    "GCond, exact": "--method gcond --mode exact",
    "GCond, stochastic": "--method gcond --mode stochastic",
}
YARDSTICK = "sum, momentum before AdamW"
FLAGS = "--steps 150 --batch-size 64 --warmup-steps 15 --eval-every 150"
FLAGS += " --eval-images 448 --devices 1"
RATES = ["1e-3", "2e-3", "4e-3", "8e-3", "16e-3"]
SEARCH, SEEDS = 0, [1, 2, 3]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="FILE.npz")
    parser.add_argument("--out", type=pathlib.Path, default="runs/ssl-measure")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--flags", default="", help="more of them, for train.py")
    parser.add_argument("--figure", action="store_true", help="differences.png")
    arguments = parser.parse_args(argv)
    chosen = {}
    for name in dict.fromkeys([*arguments.rows, YARDSTICK]):
        settings = functools.partial(make_flags, arguments, name)
        search = {rate: run(settings(rate, SEARCH)) for rate in RATES}
        rate = min(search, key=lambda rate: loss(search[rate]))
        chosen[name] = [run(settings(rate, seed)) for seed in SEEDS]
    print_table(chosen)
    if arguments.figure:
        title = pathlib.Path(arguments.data).stem
        plot(chosen, title, arguments.out / "differences.png")


def make_flags(
    arguments: argparse.Namespace, name: str, rate: str, seed: int
) -> list[str]:
    """The command line of one run."""
    stem = pathlib.Path(arguments.data).stem
    words = re.findall(r"\w+", f"{stem} {name} {rate} {seed}")
    return [
        *(*FLAGS.split(), *arguments.flags.split(), *ROWS[name].split()),
        *("--data", arguments.data, "--learning-rate", rate, "--seed", str(seed)),
        *("--out", str(arguments.out / "-".join(words))),
    ]


def run(flags: list[str]) -> dict[str, float]:
    """Results of a run, which is made first if it has not been."""
    config = config_lib.parse(flags)
    folder = pathlib.Path(config.out)
    if not (folder / "results.json").exists():
        print(folder.name)
        resume = (folder / "checkpoints").exists()
        train.run(dataclasses.replace(config, resume=resume), *prepare(config))
    results = json.loads((folder / "results.json").read_text())
    cosines = [row["cosine"] for row in runs.read(folder / "log.csv")]
    conflicts = [cosine < 0 for cosine in cosines if not math.isnan(cosine)]
    return results | {
        "rate": config.learning_rate,
        "conflicts": statistics.fmean(conflicts or [math.nan]),
    }


def prepare(config: Config) -> tuple[data.Images, train.Experiment]:
    """Images and compiled functions, which all rates and seeds of a row share."""
    return _prepare(dataclasses.replace(config, learning_rate=1.0, seed=0, out=""))


@functools.lru_cache(maxsize=1)
def _prepare(config):
    images = data.load(config)
    return images, train.make_experiment(config, images)


def loss(results: dict[str, float]) -> float:
    """The validation loss, weighed as in training."""
    return Config.l1_weight * results["l1"] + Config.ssim_weight * results["ssim"]


def print_table(runs: dict[str, list[dict[str, float]]]) -> None:
    """Mean and standard deviation over seeds, and the share of steps in conflict."""
    print("| | rate | L1 | difference | 1 - SSIM | difference | conflicts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, results in runs.items():
        cells = [f"{results[0]['rate']:g}"]
        for key in "l1", "ssim":
            values = [result[key] for result in results]
            cells += [spread(values, "")]
            off = spread(differences(runs, name, key), "+")
            cells += [off if name != YARDSTICK else ""]
        share = statistics.fmean(result["conflicts"] for result in results)
        cells += ["" if math.isnan(share) else f"{100 * share:.0f} %"]
        print(f"| {name} | {' | '.join(cells)} |")


def differences(
    runs: dict[str, list[dict[str, float]]], name: str, key: str
) -> list[float]:
    """How far a row is from the yardstick, seed by seed."""
    return [a[key] - b[key] for a, b in zip(runs[name], runs[YARDSTICK])]


def spread(values: list[float], sign: str) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


def plot(
    runs: dict[str, list[dict[str, float]]], title: str, file: pathlib.Path
) -> None:
    """The differences of the table as dots with error bars."""
    rows = {}
    for name in [name for name in runs if name != YARDSTICK]:
        values = {key: differences(runs, name, key) for key in ("l1", "ssim")}
        rows[name] = {
            key: (statistics.fmean(x), statistics.stdev(x)) for key, x in values.items()
        }
    report.plot_differences(file, {title: rows})


if __name__ == "__main__":
    run_program(main)
