"""What a run prints while it goes on, on a terminal and in a file alike."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line at once, above a progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def bar(steps: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar, on a terminal only."""
    return tqdm(steps, disable=not sys.stderr.isatty(), **options)
