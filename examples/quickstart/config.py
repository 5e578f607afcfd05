"""Settings of the quickstart; each field is a flag of train.py."""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Flat and small: change a default here, or give the flag."""

    methods: tuple[str, ...] = (
        "linear",  # Equal weights: the plain sum.
        "pcgrad",
        "cagrad",
        "upgrad",
        "mgda",
        "imtl_g",
        "nash_mtl",
    )
    draw_weights: tuple[float, ...] = (0.25, 2.0, 4.0)  # Of sums tuned by hand.
    seeds: int = 3
    steps: int = 600
    eval_every: int = 50
    batch_size: int = 64
    test_size: int = 2000
    learning_rate: float = 4e-3
    features: int = 12  # Few, so that the tasks conflict.
    data: str = ""  # FILE.npz with x_train, y_train, x_test, y_test.
    out: str = "runs/quickstart"


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a :class:`Config` from the command line."""
    parser = argparse.ArgumentParser(
        description="Train one network on three tasks, with several methods.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        many = isinstance(field.default, tuple)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default[0] if many else field.default),
            nargs="*" if many else None,
            default=field.default,
        )
    return Config(**vars(parser.parse_args(arguments)))
