"""What the methods bring, on every problem of the examples: writes evidence.md.

    python -m benchmarks.evidence --folder FOLDER_OF_THE_NPZ_FILES    # some hours
    python -m benchmarks.evidence --only MultiDigits Burgers

Each problem is a race by ``optax_mtl.compare``: the plain sum, eight static weightings
of it and a short list of methods, each at three learning rates and with three seeds;
rates and weights are chosen on figures that are not reported. Category discovery has
an entry of its own kind, from the results of ``examples.gcd.measure``. Races that the
folder --results already has are not run again.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optax_mtl
from examples import arrays, runs
from examples.gcd import measure as gcd
from examples.molecules import race as molecules
from examples.molecules.config import Config as Molecules
from examples.pinn import race as pinn
from examples.pinn.config import Config as Pinn
from examples.quickstart import data as digits
from examples.quickstart import model as quickstart
from examples.ssl import data as photos
from examples.ssl import model as autoencoder
from examples.ssl.config import Config as Ssl
from optax_mtl import scores
from optax_mtl.comparison import Comparison

METHODS = ["upgrad", "pcgrad", "imtl_g", "nash_mtl", "gradnorm"]
METHODS += ["uncertainty_weighting"]
QM9_RATES = (1e-3, 3e-3, 1e-2)
FILE = pathlib.Path(__file__).with_name("evidence.md")
FIGURES = "## Figures\n"  # What follows it is written here; the rest is not.


def multidigits(folder: pathlib.Path) -> Comparison:
    """Reading two overlaid digits and drawing them, from 12 features."""
    del folder
    train, test = digits.load()
    graph, _ = nnx.split(quickstart.Model(12, 12, rngs=nnx.Rngs(0)))

    def errors(half):
        unseen = digits.Digits(*(x[half::2] for x in test))
        batch = digits.sample(jax.random.key(0), unseen, 2000)

        def of(params):
            per_cent = 100 - quickstart.scores(nnx.merge(graph, params), batch)
            return dict(zip(("left", "right", "unexplained"), per_cent))

        return of

    def losses(params, batch):
        values = quickstart.losses(nnx.merge(graph, params), batch)
        return dict(zip(quickstart.TASKS, values))

    make = nnx.jit(lambda key: quickstart.Model(12, 12, rngs=nnx.Rngs(key)))
    return optax_mtl.compare(
        losses,
        lambda key: nnx.split(make(key))[1],
        lambda key, step: digits.sample(jax.random.fold_in(key, step), train, 64),
        METHODS,
        learning_rates=(1e-3, 3e-3, 1e-2),
        num_steps=600,
        evaluate=errors(0),
        select=errors(1),
        shared=lambda path: "trunk" in path,
    )


def masked_photos(folder: pathlib.Path) -> Comparison:
    """L1 and 1 - SSIM of hidden patches of photos, by a masked autoencoder."""
    del folder
    config = Ssl(batch_size=32)
    images = photos.load(config)
    num_patches = autoencoder.num_patches(config)
    make = autoencoder.maker(config, images)
    graph, _ = nnx.split(make(jax.random.key(0)))
    pixels = jnp.asarray(images.train)

    def draw(key, step):
        row, noise = jax.random.split(jax.random.fold_in(key, step))
        rows = jax.random.randint(row, (config.batch_size,), 0, len(pixels))
        noise = jax.random.uniform(noise, (config.batch_size, 2, num_patches))
        return photos.Batch(pixels[rows], rows, noise, jnp.zeros(1, jnp.int32))

    def errors(part):
        rng = np.random.default_rng(0)
        noise = rng.random((len(part), 2, num_patches), np.float32)
        labels, seeds = np.zeros(len(part), int), np.zeros(1, np.int32)
        batch = photos.Batch(part, labels, noise, seeds)
        return lambda params: nnx.merge(graph, params).losses(batch, train=False)

    return optax_mtl.compare(
        lambda params, batch: nnx.merge(graph, params).losses(batch, train=True),
        lambda key: nnx.split(make(key))[1],
        draw,
        METHODS,
        learning_rates=(1e-3, 3e-3, 1e-2),
        num_steps=150,
        weightings=4,
        evaluate=errors(images.valid[::2]),
        select=errors(images.valid[1::2]),
    )


def _molecules(
    file: str, rates: tuple[float, ...], **settings: Any
) -> Callable[[pathlib.Path], Comparison]:
    def run(folder):
        config = Molecules(data=str(folder / file), **settings)
        return molecules.race(config, METHODS, learning_rates=rates)

    return run


def _pinn(problem: str) -> Callable[[pathlib.Path], Comparison]:
    return lambda folder: pinn.race(Pinn(problem=problem), METHODS)


RACES: dict[str, Callable[[pathlib.Path], Comparison]] = {
    "MultiDigits": multidigits,
    "QM9, standardised": _molecules("qm9.npz", QM9_RATES, steps=700),
    "QM9, in units": _molecules("qm9.npz", QM9_RATES, steps=700, standardise=False),
    "Tox21": _molecules("tox21.npz", (3e-4, 1e-3, 3e-3), steps=200),
    "Burgers": _pinn("burgers"),
    "Kovasznay": _pinn("kovasznay"),
    "Helmholtz": _pinn("helmholtz"),
    "Masked photos": masked_photos,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, default="data")
    parser.add_argument("--results", type=pathlib.Path, default="runs/evidence")
    parser.add_argument("--only", nargs="+", choices=RACES, default=list(RACES))
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    for title in arguments.only:
        file = arguments.results / f"{title}.npz"
        if not file.exists():
            result = RACES[title](arguments.folder)
            arrays.save(file, result._asdict())
            print(f"{title}\n{result}\n")
            jax.clear_caches()  # Compiled programs use up the process's memory maps.
    found = {title: _load(arguments.results / f"{title}.npz") for title in RACES}
    found = {title: result for title, result in found.items() if result is not None}
    prose, _, _ = FILE.read_text().partition(FIGURES)
    text = "\n".join(_in_words(found, arguments.results / "gcd.csv"))
    runs.replace(FILE, f"{prose}{FIGURES}\n{text}")
    print(text)


def _load(file):
    """A comparison, or None if there is no such file."""
    if not file.exists():
        return None
    fields = arrays.load("--results", file)
    for name in ("methods", "tasks", "metrics", "maximise"):
        fields[name] = tuple(map(str, fields[name]))
    fields |= {"single_task": bool(fields["single_task"]), "rule": str(fields["rule"])}
    return Comparison(**fields)


def _in_words(found, gcd_results):
    """The tables, line by line."""
    heads = ["problem", "tasks", "weightings to match", "tuned sum"]
    heads += [f"`{name}`" for name in METHODS]
    yield "Δm in percent against the plain sum, less is better; mean ± standard"
    yield "deviation over seeds. Bold: ahead of the plain and the tuned sum in every"
    yield "seed, beyond the spread.\n"
    changes = []
    yield from _heads(heads)
    for title, result in found.items():
        rows = [result.tuned(), *map(result.methods.index, METHODS)]
        change = result.delta_m()
        ahead = result.ahead()
        cells = [_cell(change[row], row in ahead) for row in rows]
        changes.append([0.0, *change[rows].mean(axis=1)])
        yield _line([title, len(result.tasks), _weightings(result, rows[1:]), *cells])
    ranks = scores.ranks_of(np.array(changes).T)
    mean = [f"{rank:.1f}" for rank in ranks]
    yield _line([f"mean rank (plain sum: {mean[0]})", "", "", *mean[1:]])

    yield "\nTime of a step, in steps of the plain sum of the same race.\n"
    yield from _heads(["problem", *heads[4:]])
    for title, result in found.items():
        rows = map(result.methods.index, METHODS)
        ratios = [result.seconds[row] / result.seconds[0] for row in rows]
        yield _line([title, *(f"{ratio:.2f}" for ratio in ratios)])

    yield "\nWhat each race says of itself.\n"
    for title, result in found.items():
        seeds, rates = result.values.shape[2], len(result.learning_rates)
        yield f"- **{title}** ({seeds} seeds, {rates} rates): " + " ".join(
            result.verdict().splitlines()
        )
    for title in dict.fromkeys(row["data"] for row in gcd.read(gcd_results)):
        yield f"\n{gcd.chosen_table(gcd_results, title)}"
    yield ""


def _weightings(result, rows):
    """How many weightings one has to try to match the best of some rows."""
    best = min(rows, key=lambda row: result.delta_m()[row].mean())
    needed = result.weightings_to_match(best)
    return f"over {len(result.weightings) - 1}" if needed is None else needed


def _cell(change, bold):
    mean, spread = change.mean(), change.std(ddof=1)
    digits = 1 if abs(mean) < 100 else 0
    mean = round(mean, digits) + 0.0  # No "-0.0".
    text = f"{mean:+.{digits}f} ± {spread:.{digits}f}"
    return f"**{text}**" if bold else text


def _heads(heads):
    return [_line(heads), _line(["---"] * len(heads))]


def _line(cells):
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
