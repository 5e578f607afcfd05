"""The folder of a training run: its settings, its logs and its checkpoints.

A run may be killed at any moment, its disk may be full, and its files may be broken.
What is rewritten is written beside the old file and then takes its place; what cannot
be read is named, and the run goes on from what can.
"""

import contextlib
import csv
import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
import re
import sys
from typing import Any

import orbax.checkpoint as ocp

from examples.flags import UserError
from examples.progress import say


def replace(file: pathlib.Path, content: str | bytes) -> None:
    """Writes a file beside the old one, which is whole until the new one is."""
    beside = file.with_name(file.name + ".new")
    with _named(beside), beside.open("wb") as opened:
        opened.write(content.encode() if isinstance(content, str) else content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(beside, file)


class Log:
    """A CSV file of numbers, its first column a count; one row after the other.

    Args:
      file: where it is or shall be.
      columns: their names.
      last: of the rows that are there already, those up to this count stay.
    """

    def __init__(self, file: pathlib.Path, columns: list[str], last: int):
        self.file, self.columns = file, columns
        rows = [row for row in read(file) if row.get(columns[0], math.nan) <= last]
        replace(file, ",".join(columns) + "\n" + "".join(map(self._line, rows)))

    def write(self, row: dict[str, float]) -> None:
        """Appends a row; what is missing or NaN stays empty."""
        with _named(self.file), self.file.open("a", newline="") as file:
            file.write(self._line(row))

    def _line(self, row):
        values = [float(row.get(column, math.nan)) for column in self.columns]
        cells = ["" if math.isnan(x) else repr(x).removesuffix(".0") for x in values]
        return ",".join(cells) + "\n"


def read(file: pathlib.Path) -> list[dict[str, float]]:
    """Rows of a :class:`Log`, none if there is no file; empty cells are NaN.

    A row without its end, cut short when the run was killed, is left out.
    """
    if not file.exists():
        return []
    try:
        whole, _, _ = file.read_text().rpartition("\n")
        return [
            {name: float(value or "nan") for name, value in row.items()}
            for row in csv.DictReader(whole.splitlines())
        ]
    except (TypeError, ValueError) as error:  # TypeError: a row has too many cells.
        raise UserError(
            f"{file} is not a table of numbers, mend or remove it: {error}"
        ) from error


# On these the result of a run does not depend.
FREE = ("out", "resume", "devices", "tensorboard")


def check_settings(folder: pathlib.Path, config: Any, last: int | None) -> None:
    """Refuses to overwrite a run, or to continue it with other settings.

    Args:
      folder: of the run; made if it is missing.
      config: the settings, a dataclass with a field `resume`; those on which the result
        depends are kept in `config.json`.
      last: the last checkpoint; None if there is none.

    Raises:
      FileExistsError: if there is a run, and the user does not want to continue it.
      ValueError: if its settings are others, or cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    settings = {name: x for name, x in settings.items() if name not in FREE}
    file = folder / "config.json"
    if last is None:
        if config.resume:
            say(f"--resume: there is no checkpoint in {folder}, so this starts anew")
        replace(file, json.dumps(settings, indent=2) + "\n")
        return
    if not config.resume:
        raise FileExistsError(
            f"{folder} holds a run up to checkpoint {last}: continue it with --resume, "
            "or choose another --out"
        )
    try:
        old = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--resume: the settings of the run in {file} cannot be read ({error}): "
            "mend that file, or choose another --out"
        ) from error
    for name, value in settings.items():
        if old.get(name) != value:
            raise UserError(
                f"--resume: the run in {folder} has {name} {old.get(name)!r}, not "
                f"{value!r}"
            )


def open_checkpoints(folder: pathlib.Path) -> ocp.CheckpointManager:
    """The last two checkpoints of the run in a folder."""
    _ignore_late_reports()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(
        (folder / "checkpoints").absolute(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),  # Else guessed from the files.
    )


def save(saved: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Writes a checkpoint; the older of two others is removed.

    Raises:
      OSError: if it cannot be written, for example since the disk is full.
    """
    problem = None
    try:
        saved.save(step, args=ocp.args.StandardSave(state))
    except Exception as error:
        problem = _in_one_line(error)
    if problem is not None:
        gc.collect()  # What is left of it would complain when the program ends.
        raise OSError(f"checkpoint {step} in {saved.directory}: {problem}")


def restore(saved: ocp.CheckpointManager, fresh: Any) -> tuple[int, Any]:
    """The last checkpoint that can be read.

    Those that cannot are moved out of the way, for the run will write them again.

    Args:
      saved: the checkpoints.
      fresh: a state of the structure that was saved.

    Returns:
      The step of the checkpoint and its state; 0 and `fresh` if there is none.

    Raises:
      ValueError: if there are checkpoints and none of them can be read.
    """
    steps = sorted(saved.all_steps(), reverse=True)
    for step in steps:
        problem, state = None, None
        try:
            state = saved.restore(step, args=ocp.args.StandardRestore(fresh))
        except Exception as error:
            problem = _in_one_line(error)
        if problem is None:
            for broken in steps[: steps.index(step)]:
                _set_aside(saved, broken)
            return step, state
        gc.collect()
        say(f"checkpoint {step} in {saved.directory} cannot be read: {problem}")
    if steps:
        raise UserError(
            f"no checkpoint in {saved.directory} can be read: start anew with another "
            "--out"
        )
    return 0, fresh


def tensorboard(folder: pathlib.Path, start: int) -> Any:
    """A writer of TensorBoard's logs; what an earlier run wrote from `start` on goes.

    Raises:
      ImportError: if tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs `pip install tensorboardX`") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start)


@contextlib.contextmanager
def _named(file):
    """Adds the file to an error of writing it, such as that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


@functools.cache  # Once.
def _ignore_late_reports():
    """Drops what threads tell an event loop that Orbax closed when something failed.

    It says nothing of what failed, and may be the last that the user sees.
    """
    otherwise = sys.unraisablehook

    def hook(unraisable):
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and "loop is closed" in str(error)
        if not closed:
            otherwise(unraisable)

    sys.unraisablehook = hook


def _in_one_line(error):
    text = " ".join(str(error).split())
    text, *_ = re.split(r" \[\S+?=", text)  # TensorStore appends details for machines.
    if len(text) > 500:  # Of a long one, what failed and why.
        text = f"{text[:250]} ... {text[-230:]}"
    return f"{type(error).__name__}: {text}"


def _set_aside(saved, step):
    """Moves a checkpoint from N to unreadable-N, beside the folder of the others."""
    place = pathlib.Path(saved.directory).parent / f"unreadable-{step}"
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"unreadable-{step}-{number}")
    os.replace(pathlib.Path(saved.directory) / str(step), place)
    saved.reload()
    say(f"moved it to {place}")
