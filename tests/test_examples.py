"""The examples run from the command line's entry point to their figure."""

import numpy as np

from examples.quickstart import train

FAST = "--steps 4 --eval-every 2 --batch-size 8 --test-size 32 --seeds 2".split()


def test_quickstart_trains_prints_and_draws(tmp_path, capsys):
    methods = ["--methods", "linear", "pcgrad", "mgda", "--draw-weights", "2"]
    train.main([*FAST, *methods, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in ("method", "sum", "pcgrad", "mgda", "sum, draw x2"):
        assert name in printed
    assert "nan" not in printed
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_quickstart_reads_digits_of_another_size_from_a_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("test", 20)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 14, 14), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, 10, count)
    np.savez(tmp_path / "digits.npz", **arrays)
    only_sum = ["--methods", "linear", "--draw-weights"]
    files = ["--data", str(tmp_path / "digits.npz"), "--out", str(tmp_path)]
    train.main([*FAST, *only_sum, *files])
    assert "sum" in capsys.readouterr().out
