"""What a run prints while it goes on, on a terminal and in a file alike."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line at once, above a progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def bar(steps: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar, on a terminal only."""
    return tqdm(steps, disable=not sys.stderr.isatty(), **options)


def steps(config: Any, start: int) -> tqdm:
    """The numbers of the steps of a run after the first ``start``, with a bar."""
    return bar(
        range(start + 1, config.steps + 1),
        desc=config.method,
        initial=start,
        total=config.steps,
        unit="step",
    )


def in_words(values: Mapping[str, float]) -> str:
    """Names and numbers in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


class Speed:
    """The time of steps, but for the first one, which compiles."""

    def __init__(self) -> None:
        self.seconds, self.counted = 0.0, -1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.counted += 1
        if self.counted > 0:
            self.seconds += time.perf_counter() - began

    def report(self, name: str, size: int = 1) -> dict[str, float]:
        """So many a second, of ``size`` in a step; nothing if no step was timed."""
        if self.counted < 1:
            return {}
        return {name: size * self.counted / self.seconds}
