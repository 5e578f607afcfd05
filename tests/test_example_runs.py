"""What all examples share: flags, logs, checkpoints, files; nothing is compiled here.

A run may be killed at any byte that it writes, its disk may be full and its files
broken: each of these is made here, and what must remain follows from what was written.
"""

import dataclasses
import errno
import io
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from examples import arrays, progress, runs
from examples.flags import Number, UserError, run_program
from examples.gcd import config as gcd
from examples.gcd import data as gcd_data
from examples.gcd import weights as gcd_weights
from examples.molecules import config as molecules
from examples.pinn import config as pinn
from examples.quickstart import config as quickstart
from examples.quickstart import data as quickstart_data
from examples.ssl import config as ssl

CONFIGS = {
    "gcd": gcd,
    "molecules": molecules,
    "pinn": pinn,
    "quickstart": quickstart,
    "ssl": ssl,
}
FLAGS = {
    f"{name} {field.name}": (config, field)
    for name, config in CONFIGS.items()
    for field in dataclasses.fields(config.Config)
}
every_flag = pytest.mark.parametrize("flag", FLAGS)


def flag_of(field):
    return "--" + field.name.replace("_", "-")


def refused(config, arguments, capsys):
    """What is said of arguments that end the program."""
    with pytest.raises(SystemExit) as ended:
        config.parse(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@every_flag
def test_a_number_out_of_bounds_is_refused(flag, capsys):
    config, field = FLAGS[flag]
    default = field.default[0] if isinstance(field.default, tuple) else field.default
    if isinstance(default, bool) or not isinstance(default, int | float):
        return
    number = field.metadata["kind"]
    assert isinstance(number, Number), "any number would do"
    outside = ["nan", "inf", "ten", str(number.least - 1), str(number.most + 1)]
    outside += [str(number.above), str(number.below)]
    outside += ["1.5"] if number.type is int else []
    for text in outside:
        message = refused(config, [f"{flag_of(field)}={text}"], capsys)
        assert f"argument {flag_of(field)}: expected {number}, got {text}" in message
    for inside in (number.least, number.most):
        if np.isfinite(inside):
            number(str(inside))
    assert number(str(default)) == default


@every_flag
def test_a_name_that_is_not_one_is_refused(flag, capsys):
    config, field = FLAGS[flag]
    free = ("data", "out", "image_folder", "backbone_weights")
    text = isinstance(field.default, str) or field.name == "methods"
    if text and field.name not in free:
        message = refused(config, [flag_of(field), "nonsense"], capsys)
        assert f"argument {flag_of(field)}: " in message


@pytest.mark.parametrize("name", CONFIGS)
def test_help_says_what_each_flag_means_and_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # No word is divided.
    with pytest.raises(SystemExit):
        CONFIGS[name].parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    fields = dataclasses.fields(CONFIGS[name].Config)
    assert printed.count("(default: ") == len(fields)
    for field in fields:
        assert field.metadata["help"] in printed


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (gcd, "--trainable none", "choose from"),
        (gcd, "--epochs -1", "a whole number of at least 1, got -1"),
        (gcd, "--batch-size 0", "of at least 1, got 0"),
        (gcd, "--labelled-share 2", "a number above 0 and of at most 1, got 2"),
        (gcd, "--method pcgradd", "did you mean 'pcgrad'"),
        (pinn, "--problem heat", "choose from"),
        (pinn, "--boundary-weight 0", "a number above 0, got 0"),
        (pinn, "--method graddrop --mode gram", "take auto or stacked"),
        (quickstart, "--methods", "name at least one"),
        (quickstart, "--methods linear pgrad", "there is no method 'pgrad'"),
        (quickstart, "--steps 70", "not a multiple of --eval-every 50"),
        (ssl, "--encoder resnet", "known are mobilenet_v3_tiny"),
        (ssl, "--micro-batches 3", "does not split"),
        (ssl, "--third-task contrastive --batch-size 128", "multiples of the 3 tasks"),
        (ssl, "--warmup-steps 500", "fewer than --steps"),
        (ssl, "--data a.npz --image-folder b", "not both"),
        (ssl, "--decoder-heads 3", "--decoder-width 64 does not split"),
    ],
)
def test_settings_that_cannot_work(config, arguments, message, capsys):
    assert message in refused(config, arguments.split(), capsys)


# Logs


def write_log(file, count):
    log = runs.Log(file, ["step", "loss", "cosine"], last=0)
    for step in range(1, count + 1):
        cosine = {"cosine": -1} if step % 2 else {}
        log.write({"step": step, "loss": step / 3} | cosine)
    return runs.read(file)


def same(rows, expected):
    values = lambda rows: np.array([list(row.values()) for row in rows])
    return np.array_equal(values(rows), values(expected), equal_nan=True)


def test_a_log_cut_at_any_byte_keeps_the_rows_before_and_no_other(tmp_path):
    file = tmp_path / "log.csv"
    rows = write_log(file, 12)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert np.isnan(rows[1]["cosine"]) and rows[0]["cosine"] == -1
    assert [row["loss"] for row in rows] == [step / 3 for step in range(1, 13)]
    text = file.read_text()
    for length in range(len(text)):
        file.write_text(text[:length])
        whole = max(text[:length].count("\n") - 1, 0)
        assert same(runs.read(file), rows[:whole]), length
    for last in (0, 5, 12, 30):  # Resumed from a checkpoint at this step.
        file.write_text(text[:-3])
        log = runs.Log(file, ["step", "loss", "cosine"], last)
        assert same(runs.read(file), rows[: min(last, 11)])
        log.write({"step": last + 1})
        assert runs.read(file)[-1]["step"] == last + 1


def test_a_log_with_line_ends_of_earlier_runs(tmp_path):
    file = tmp_path / "log.csv"
    rows = write_log(file, 3)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert same(runs.read(file), rows)


@pytest.mark.parametrize("content", [b"step\nten\n", b"step\n1,2\n", b"\xff\xfe\n"])
def test_a_log_that_is_none_is_named(content, tmp_path):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.csv is not a table of numbers"):
        runs.Log(tmp_path / "log.csv", ["step"], last=1)
    assert (tmp_path / "log.csv").read_bytes() == content


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_killed_while_a_file_is_rewritten_the_old_one_is_whole(
    fails, tmp_path, monkeypatch
):
    file = tmp_path / "log.csv"
    rows = write_log(file, 9)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, fails, killed)
    with pytest.raises(KeyboardInterrupt):
        runs.Log(file, ["step", "loss", "cosine"], last=3)
    assert same(runs.read(file), rows)


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    log = runs.Log(tmp_path / "log.csv", ["step"], last=0)
    full = OSError(errno.ENOSPC, "No space left on device")

    class Full(io.StringIO):
        def write(self, text):
            raise full

    monkeypatch.setattr(pathlib.Path, "open", lambda *_, **__: Full())
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.csv'"):
        log.write({"step": 1})


# Settings and checkpoints


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    out: str = "a"
    resume: bool = False


def test_resuming_without_a_checkpoint_is_said(tmp_path, capsys):
    runs.check_settings(tmp_path / "run", Settings(), None)
    assert capsys.readouterr().out == ""
    runs.check_settings(tmp_path / "run", Settings(resume=True), None)
    assert "no checkpoint in" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"lr": 0.1}


def test_a_run_is_continued_with_its_own_settings_alone(tmp_path):
    runs.check_settings(tmp_path, Settings(), None)
    with pytest.raises(FileExistsError, match="--resume, or choose"):
        runs.check_settings(tmp_path, Settings(), 7)
    with pytest.raises(ValueError, match=r"has lr 0\.1, not 0\.2"):
        runs.check_settings(tmp_path, Settings(0.2, resume=True), 7)
    runs.check_settings(tmp_path, Settings(out="b", resume=True), 7)


@pytest.mark.parametrize("text", [None, "", '{"lr": 0.', "[1]"])
def test_broken_settings_are_named(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        runs.check_settings(tmp_path, Settings(resume=True), 7)


def state_of(step):
    return {"params": np.full((3, 4), step, np.float32), "step": np.array(step)}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with runs.open_checkpoints(folder) as saved:
        for step in (10, 20, 30):
            runs.save(saved, step, state_of(step))
        assert saved.all_steps() == [20, 30]
    return folder


def break_files(place, way):
    files = [file for file in [place, *place.rglob("*")] if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 * (way == "cut")])
    if way == "missing":
        shutil.rmtree(place) if place.is_dir() else place.unlink()


@pytest.mark.parametrize("way", ["missing", "empty", "cut"])
@pytest.mark.parametrize("place", ["default", "default/d", "default/manifest.ocdbt"])
def test_a_broken_checkpoint_is_set_aside_for_the_one_before(
    place, way, two_checkpoints, tmp_path, capsys
):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    break_files(tmp_path / "run" / "checkpoints" / "30" / place, way)
    with runs.open_checkpoints(tmp_path / "run") as saved:
        assert saved.latest_step() == 30
        step, state = runs.restore(saved, state_of(0))
        assert step == 20 and (state["params"] == 20).all() and state["step"] == 20
        runs.save(saved, 30, state_of(30))
        step, state = runs.restore(saved, state_of(0))
        assert step == 30 and state["step"] == 30
    said = capsys.readouterr().out
    assert f"checkpoint 30 in {tmp_path / 'run' / 'checkpoints'} cannot be read" in said
    assert (tmp_path / "run" / "unreadable-30").is_dir()


def test_no_checkpoint_that_can_be_read(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    break_files(tmp_path / "run" / "checkpoints", "empty")
    with (
        runs.open_checkpoints(tmp_path / "run") as saved,
        pytest.raises(ValueError, match="start anew with another --out"),
    ):
        runs.restore(saved, state_of(0))
    assert (tmp_path / "run" / "checkpoints" / "30").is_dir()  # Nothing is moved.


def test_nothing_to_restore(tmp_path):
    fresh = state_of(0)
    with runs.open_checkpoints(tmp_path) as saved:
        assert runs.restore(saved, fresh) == (0, fresh)


def test_a_checkpoint_that_cannot_be_written_is_named():
    class Full:
        directory = pathlib.Path("runs/a/checkpoints")

        def save(self, *_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: " + "x" * 1000 + ": No space left")

    with pytest.raises(OSError, match=r"checkpoint 7 in runs/a.*No space left$"):
        runs.save(Full(), 7, {})


# Files


@pytest.mark.parametrize("kind", ["text", "empty", "npy", "objects", "cut"])
def test_a_file_that_is_not_npz(kind, tmp_path):
    file = tmp_path / "images.npz"
    np.savez(file, x=np.arange(1000))
    if kind == "npy":
        file = tmp_path / "images.npy"
        np.save(file, np.arange(3))
    elif kind == "objects":
        np.savez(file, x=np.array([{}], object))
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_text("some words\n" if kind == "text" else "")
    with pytest.raises(ValueError, match="not an NPZ file of arrays") as caught:
        arrays.load("--data", file)
    assert caught.value.__context__ is None  # NumPy's advice is to load it unsafely.


def test_weights_and_pickles_that_are_none(tmp_path):
    (tmp_path / "a.safetensors").write_text("some words, but more than eight bytes")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a safetensors file"):
        gcd_weights.load(None, str(tmp_path / "a.safetensors"))
    (tmp_path / "train").write_text("some words")
    with pytest.raises(ValueError, match="train: not a pickle of CIFAR"):
        gcd_data.load(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_test": None}, "none of"),
        ({"x_train": np.zeros((4, 8, 6), np.uint8)}, "size, size"),
        ({"x_train": np.zeros((4, 8, 8))}, "in uint8 .* float64"),
        ({"y_train": np.array([0, 1, 2, 10])}, "a digit from 0 to 9"),
        ({"y_test": np.arange(3)}, "each of the 4 images"),
    ],
)
def test_files_of_digits(change, message, tmp_path):
    whole = {"x": np.zeros((4, 8, 8), np.uint8), "y": np.arange(4)}
    parts = {f"{k}_{part}": v for k, v in whole.items() for part in ("train", "test")}
    parts = {k: v for k, v in (parts | change).items() if v is not None}
    np.savez(tmp_path / "digits.npz", **parts)
    with pytest.raises(ValueError, match=message):
        quickstart_data.load(str(tmp_path / "digits.npz"))


def test_what_is_said_does_not_wait_in_a_buffer(tmp_path, monkeypatch):
    with (tmp_path / "out.txt").open("w", buffering=2**20) as out:
        monkeypatch.setattr("sys.stdout", out)
        progress.say("step 1")
        assert (tmp_path / "out.txt").read_text() == "step 1\n"


@pytest.mark.parametrize(
    "error",
    [
        UserError("--known 10: too many"),
        FileNotFoundError(2, "no", "a.npz"),
        FileExistsError("runs/gcd holds a run: continue it with --resume"),
        FloatingPointError("step 3: losses are not finite"),
    ],
)
def test_what_a_user_can_set_right_ends_the_program_in_a_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: {error}\n")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match="axis"):
        run_program(lambda: np.zeros(3).sum(axis=1))


def test_flags_that_do_not_suit_the_data_are_errors_of_the_user():
    config = gcd.parse(["--known", "11"])
    with pytest.raises(UserError, match="--known 11"):
        gcd_data.make_split(*gcd_data.load(config.data), config)
