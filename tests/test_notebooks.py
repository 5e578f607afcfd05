"""Every notebook runs, and is in step with its script.

FAST makes them short, but for the one on several devices, which has failed in full size
alone: it runs as for users.
"""

import os
import pathlib
import subprocess
import sys

import jupytext
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@every_script
def test_runs(script, tmp_path):
    fast = {"FAST": "1", "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | fast | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@every_script
def test_is_in_step_with_its_notebook(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    expected = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    remedy = f"jupytext --to ipynb --update notebooks/{script.name}"
    assert cells == expected, f"run: {remedy}"
    for cell in notebook.cells:
        assert not cell.get("outputs"), "strip the outputs"
        assert not cell.get("execution_count"), "strip the execution counts"


@every_script
def test_opens_on_colab_without_replacing_jax(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    first, install = notebook.cells[:2]
    assert first.source.startswith("[![Open in Colab]")
    assert f"notebooks/{script.stem}.ipynb" in first.source
    assert "google.colab" in install.source and "--no-deps" in install.source
    assert notebook.metadata.accelerator in ("GPU", "TPU")
    assert notebook.metadata.kernelspec.name == "python3"
