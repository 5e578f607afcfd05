"""What a race found: arrays, a table and a verdict."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from optax_mtl import scores


class Comparison(NamedTuple):
    """What :func:`compare` returns: arrays, and the two ways to read them.

    The rows are ``methods``: ``"sum"``, the static weightings, ``"only <task>"`` with
    ``single_task``, and the methods of the race. Runs that diverged hold NaN.
    """

    methods: tuple[str, ...]  # Names of the M rows.
    tasks: tuple[str, ...]  # Names of the T tasks.
    metrics: tuple[str, ...]  # Names of the K metrics.
    maximise: tuple[str, ...]  # Those of which more is better.
    learning_rates: np.ndarray  # Shape (R,).
    weightings: np.ndarray  # Of the first W + 1 rows, sum included, shape (W + 1, T).
    single_task: bool  # Whether the T rows after these are tasks alone.
    values: np.ndarray  # What is reported, shape (M, R, S, K).
    selection: np.ndarray  # What the choice is made on, shape (M, R, Z, K).
    losses: np.ndarray  # Means over stretches of training, shape (M, R, S, P, T).
    min_cosines: np.ndarray  # Of the most opposed pair, or NaN, shape (M, R, S, P).
    seconds: np.ndarray  # Of one step of one run, shape (M,).
    num_steps: np.ndarray  # Of each run, shape (M,).
    rule: str  # How rates and weights were chosen.

    def chosen(self) -> np.ndarray:
        """The number of the learning rate of each row, by the selection; shape (M,)."""
        return np.argmin(self._selected(), axis=1)

    def tuned(self) -> int:
        """The row of the static weighting that the selection puts first."""
        return int(np.argmin(self._selected().min(axis=1)[: len(self.weightings)]))

    def at_best(self) -> np.ndarray:
        """Reported metrics of each row at its chosen rate, shape (M, S, K)."""
        return self.values[np.arange(len(self.methods)), self.chosen()]

    def delta_m(self) -> np.ndarray:
        """Against the mean of the plain sum, seed by seed, shape (M, S)."""
        found = self.at_best()
        return scores.relative_change(found, found[0].mean(axis=0), self._signs())

    def racers(self) -> list[int]:
        """The rows of the methods, without sums and single tasks."""
        return list(range(len(self.methods)))[self._alone().stop :]

    def ahead(self) -> list[int]:
        """The methods that are ahead of the plain and the tuned sum in every seed, and
        by more than the spread of the difference."""
        change = self.delta_m()
        # The tuned sum may be behind the plain one on what is reported.
        rivals = change[0], change[self.tuned()]
        better = lambda i: all(_is_ahead(change[i], rival) for rival in rivals)
        return list(filter(better, self.racers()))

    def tuning_curve(self) -> np.ndarray:
        r"""Mean Δm that tuning comes to after k = 0, ..., W weightings, shape (W + 1,).

        The mean over all choices of k of the W weightings, where of those and the
        plain sum the one counts that the selection puts first:

        .. math::

          \sum_i \binom{W - i}{k - 1} \Delta m_i \, / \, \binom{W}{k},

        with the weightings in the order of the selection. NaN if the plain sum
        diverged, for then there is no Δm.
        """
        score = self._selected().min(axis=1)[: len(self.weightings)]
        order = np.argsort(score[1:], kind="stable")
        means = self.delta_m().mean(axis=1)
        if not np.isfinite(means[0]):
            return np.full(len(score), np.nan)
        change = means[1:][order]
        change = np.where(np.isnan(change), np.inf, change)  # Diverged where reported.
        change = np.where(score[1:][order] < score[0], change, 0.0)
        count = len(order)
        curve = [0.0]
        for k in range(1, count + 1):
            ways = np.array([math.comb(count - i, k - 1) for i in range(1, count + 1)])
            curve.append(float(ways @ change / ways.sum()))
        return np.array(curve)

    def weightings_to_match(self, row: int) -> int | None:
        """After how many weightings tuning comes to the Δm of a row; None: more."""
        enough = np.flatnonzero(self.tuning_curve() <= self.delta_m()[row].mean())
        return int(enough[0]) if len(enough) else None

    def frontier(self) -> np.ndarray:
        """Mean metrics of the static weightings at their rates, shape (W + 1, K)."""
        return self.at_best()[: len(self.weightings)].mean(axis=1)

    def table(self) -> str:
        """The figures at the chosen rates, as markdown."""
        return _table(self)

    def verdict(self) -> str:
        """What follows from the figures, in plain sentences."""
        return "\n".join(_sentences(self))

    def __repr__(self):
        return f"{self.table()}\n\n{self.verdict()}"

    def _alone(self):
        """The rows of the single tasks."""
        start = len(self.weightings)
        return range(start, start + len(self.tasks) * self.single_task)

    def _signs(self):
        return scores.signs_of(self.metrics, self.maximise)

    def _selected(self):
        """Mean change of each row and rate on the selection; infinite if diverged."""
        # In units of a typical run of the plain sum.
        finite = self.selection[0][np.isfinite(self.selection[0]).all(axis=-1)]
        unit = np.median(finite, axis=0) if len(finite) else np.ones(len(self.metrics))
        signs = self._signs() / np.where(unit == 0, 1, np.abs(unit))
        change = np.mean(signs * (self.selection - unit), axis=-1)
        mean = change.mean(axis=2)
        return np.where(np.isfinite(mean), mean, np.inf)


def _table(it: Comparison) -> str:
    """The plain sum, the tuned sum, the single tasks and the methods."""
    best, change, chosen = it.at_best(), it.delta_m(), it.chosen()
    tuned = it.tuned()
    rows = [0, tuned, *it.racers()]
    labels = ["sum", "tuned sum", *(f"`{it.methods[i]}`" for i in rows[2:])]
    ranks = scores.ranks_of(it._signs() * best[rows].mean(axis=1))
    alone = _single_task(it)
    columns = ["", "rate", *it.metrics, "Δm %"]
    columns += ["Δm % single task"] * (alone is not None)
    columns += ["mean rank", "Δm % - tuned sum", "conflict %", "ms a step", "diverged"]
    lines = [columns, ["---"] * len(columns)]
    if alone is not None:
        cells = [f"{x:.4g}" for x in alone]
        lines.append(["single tasks", "", *cells, "", "0", *[""] * 5])
    for label, i, rank in zip(labels, rows, ranks):
        metrics = [_with_spread(best[i, :, k]) for k in range(len(it.metrics))]
        cells = [label, f"{it.learning_rates[chosen[i]]:.3g}", *metrics]
        cells.append(_with_spread(change[i], "+.2f"))
        if alone is not None:
            mean = best[i].mean(axis=0)
            cells.append(f"{scores.relative_change(mean, alone, it._signs()):+.2f}")
        opposed = _conflict(it, i)
        runs = np.isnan(it.values[i]).any(axis=-1)
        ahead = " ".join(f"{x:+.2f}" for x in change[i] - change[tuned])
        cells += [f"{rank:.1f}", ahead]
        cells.append("" if opposed is None else f"{100 * opposed:.0f}")
        cells += [f"{1000 * it.seconds[i]:.3g}", f"{runs.sum()} of {runs.size}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _conflict(it, row):
    """Share of the points with a negative cosine at the chosen rate; or None."""
    if np.isnan(it.min_cosines).all():
        return None  # Not measured.
    return (it.min_cosines[row, it.chosen()[row]] < 0).mean()


def _with_spread(values, form=".4g"):
    """Mean and standard deviation over the seeds."""
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    mean = values.mean()
    mean = 0.0 if abs(mean) < 1e-9 else mean  # No "-0.00".
    return f"{mean:{form}}{spread}"


def _single_task(it):
    """Each metric by the task alone that selection finds best at it; or None."""
    rows = list(it._alone())
    if not rows:
        return None
    score = it._signs() * it.selection[rows].mean(axis=2)
    score = np.where(np.isnan(score), np.inf, score).reshape(-1, len(it.metrics))
    reported = it.values[rows].mean(axis=2).reshape(score.shape)
    return np.take_along_axis(reported, score.argmin(axis=0)[None], axis=0)[0]


def _sentences(it: Comparison) -> Iterator[str]:
    """The verdict, one sentence an item."""
    change, tuned = it.delta_m(), it.tuned()
    num_seeds, num_rates = it.values.shape[2], len(it.learning_rates)
    trials = len(it.weightings) * num_rates
    if np.isnan(it.at_best()[0]).any():
        yield (
            "The plain sum diverged in a reported seed at every rate, or at the one"
            " chosen, so that there is nothing to compare with: lower learning_rates."
        )
        return
    if not np.isfinite(change[0]).all():
        zero = np.flatnonzero(it.at_best()[0].mean(axis=0) == 0)
        yield (
            f"{it.metrics[zero[0]]} of the plain sum is 0, so that there is no relative"
            " change: report another metric, such as an error for an accuracy."
        )
        return
    if num_seeds == 1:
        yield (
            "One seed: there is no spread, so that no difference means anything; take"
            " three seeds or more."
        )
    ahead = it.ahead()
    for i in ahead:
        difference = change[tuned] - change[i]
        yield (
            f"{it.methods[i]} is ahead of the tuned sum in every seed, by"
            f" {_with_spread(difference, '.2f')} points of Δm, at"
            f" {it.seconds[i] / it.seconds[0]:.1f} times the time of a step."
        )
    if not ahead and num_seeds > 1:
        yield (
            "Keep the sum: no method is ahead of the plain and the tuned sum beyond the"
            " spread of the seeds."
        )
    weights = ", ".join(f"{x:.2g}" for x in it.weightings[tuned])
    if tuned and _is_ahead(change[tuned], change[0]):
        yield (
            f"Tuning pays: weights of {weights} are ahead of the plain sum by"
            f" {_with_spread(change[0] - change[tuned], '.2f')} points of Δm, after"
            f" {trials} trials for each seed."
        )
    level = [i for i in it.racers() if i not in ahead]
    level = [i for i in level if _is_ahead(change[i], change[0])]
    level = [i for i in level if not _is_ahead(change[tuned], change[i])]
    for i in level if tuned else ():
        yield (
            f"{it.methods[i]} saves tuning: ahead of the plain sum, and not behind the"
            f" tuned one beyond the spread, after {num_rates} trials, not {trials}."
        )
    behind = [i for i in it.racers() if _is_ahead(change[0], change[i])]
    if behind:
        lost = ", ".join(it.methods[i] for i in behind)
        yield f"Behind the plain sum in every seed, beyond the spread: {lost}."
    chosen, last = it.chosen(), num_rates - 1
    labels = {0: "the sum", tuned: "the tuned sum"} | {
        i: it.methods[i] for i in it.racers()
    }
    for end, word in ((0, "smallest"), (last, "largest")) if last else ():
        names = [label for i, label in labels.items() if chosen[i] == end]
        if names:
            yield (
                f"The {word} rate tried is the best of {', '.join(names)}: try"
                f" {'smaller' if end == 0 else 'larger'} ones, too."
            )
    opposed = _conflict(it, 0)
    if opposed is not None:
        yield (
            f"Gradients of the plain sum conflicted at {100 * opposed:.0f} % of"
            f" {it.min_cosines.shape[-1]} points of its training."
        )
    diverged = np.isnan(it.values).any(axis=-1).sum()
    if diverged:
        yield f"{diverged} of {it.values[..., 0].size} runs diverged."
    yield f"Rates and weights were chosen {it.rule}."


def _is_ahead(change, other):
    """Whether in every seed, and by more than the spread of the difference."""
    difference = other - change
    if len(difference) < 2:
        return False
    return bool(np.all(difference > 0) & (difference.mean() > difference.std(ddof=1)))
