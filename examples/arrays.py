"""Arrays in files; users are told what is wrong with theirs."""

import io
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from examples import runs
from examples.flags import UserError


def load(flag: str, file: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not one, or holds Python objects, which could run code.
    """
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"{flag} {file}: no such file")
    with open(file, "rb") as opened:
        try:
            with np.load(opened) as arrays:
                return dict(arrays)
        except (
            *(OSError, ValueError, EOFError, TypeError, AttributeError),
            *(zipfile.BadZipFile, zlib.error),
        ):
            pass  # NumPy's own message advises to load it unsafely.
    raise UserError(f"{flag} {file}: not an NPZ file of arrays")


def first_of(
    names: Iterable[str], arrays: dict[str, np.ndarray], flag: str, file: Any
) -> np.ndarray:
    """The first array that is there."""
    for name in names:
        if name in arrays:
            return arrays[name]
    raise UserError(f"{flag} {file} has {sorted(arrays)}, but none of {list(names)}")


def save(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an NPZ file beside the old one, which is whole until the new one is."""
    written = io.BytesIO()
    np.savez(written, **arrays)
    runs.replace(file, written.getvalue())


def by_name(state: nnx.State) -> dict[str, np.ndarray]:
    """The arrays of a state, with the parts of their paths joined by dots."""
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(x[...]) for path, x in flat}
