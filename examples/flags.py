"""A command line from a dataclass of settings: each field is a flag.

What a flag means stands beside its default, and its bounds are checked before any work
is done.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import optax_mtl

Config = TypeVar("Config")


class UserError(ValueError):
    """What a user can set right: a flag that does not suit the data, a file."""


def setting(
    default: Any,
    help: str,
    kind: Callable[[str], Any] | None = None,
    choices: Collection[str] | None = None,
) -> Any:
    """A field of a configuration.

    Args:
      default: its value if the flag is not given; a tuple takes several values.
      help: what it means, for `--help`.
      kind: reads one value from text, such as :class:`Number`; by default the type of
        `default`.
      choices: the only values it may have.
    """
    metadata = {"help": help, "kind": kind, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Number:
    """Reads a finite number within bounds."""

    type: type  # `int` or `float`.
    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def __call__(self, text: str) -> Any:
        try:
            value = self.type(text)
            inside = self.least <= value <= self.most
            inside = inside and self.above < value < self.below
        except ValueError:
            inside = False
        if not inside:
            raise argparse.ArgumentTypeError(f"expected {self}, got {text}")
        return value

    def __str__(self) -> str:
        bounds = {
            "of at least": self.least,
            "above": self.above,
            "below": self.below,
            "of at most": self.most,
        }
        words = [f"{word} {x:g}" for word, x in bounds.items() if math.isfinite(x)]
        noun = "a whole number" if self.type is int else "a number"
        return " ".join([noun, " and ".join(words)]).strip()


def whole(least: int) -> Number:
    """Reads a whole number that is at least so large."""
    return Number(int, least=least)


def method(*others: str) -> Callable[[str], str]:
    """Reads the name of a method of the catalog, or one of some other names."""

    def read(name: str) -> str:
        if name not in others:
            try:
                optax_mtl.get(name, num_tasks=2)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        return name

    return read


def parse(
    config: type[Config],
    arguments: list[str] | None,
    description: str,
    check: Callable[[Config], None] = lambda config: None,
) -> Config:
    """Reads a configuration from the command line; ends the program if it is wrong.

    Args:
      config: a dataclass whose fields are :func:`setting`.
      arguments: flags and values; by default those of the program.
      description: of the program, for `--help`.
      check: raises ValueError for settings that do not go together.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        default, given = field.default, field.metadata
        text = given["help"]
        if isinstance(given["kind"], Number):
            text = f"{text} [{given['kind']}]"
        several = isinstance(default, tuple)
        options: dict[str, Any] = {
            "type": given["kind"] or type(default),
            "choices": given["choices"],
            "metavar": None if given["choices"] else "VALUE",
        }
        if several:
            options["nargs"] = "*"
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=default, help=text, **options)
    read = config(**vars(parser.parse_args(arguments)))
    try:
        check(read)
    except ValueError as error:
        parser.error(str(error))
    return read


# Of a setting, a file, a folder in use, or a run that a smaller rate would save.
_OF_THE_USER = (UserError, FileNotFoundError, FileExistsError, FloatingPointError)


def run_program(main: Callable[[], Any]) -> None:
    """Runs a program; what its user can set right ends it as a wrong flag does."""
    try:
        main()
    except _OF_THE_USER as error:
        program = pathlib.Path(sys.argv[0]).name
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
