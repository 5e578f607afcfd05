"""Every notebook runs, and is in step with its script.

FAST makes them short, but for the one on several devices, which has failed in full size
alone: it runs as for users.
"""

import os
import pathlib
import re
import subprocess
import sys

import jupytext
import pytest

from docs import address

MAX_BYTES = 250_000  # Of a notebook with its figures.
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
    remedy = f"python -m docs.run_notebooks {script.stem}"
    assert cells == expected, f"run: {remedy}"
    for cell in notebook.cells:
        assert not cell.get("execution_count"), "strip the execution counts"
    size = script.with_suffix(".ipynb").stat().st_size
    assert size < MAX_BYTES, "make its figures smaller, or strip the outputs"


@every_script
def test_opens_on_colab_without_replacing_jax(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    first, install = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert "google.colab" in install.source and "--no-deps" in install.source
    assert notebook.metadata.accelerator in ("GPU", "TPU")
    assert notebook.metadata.kernelspec.name == "python3"


def test_the_address_is_everywhere_or_nowhere():
    """As pyproject.toml has it; no placeholder reaches a reader."""
    where = address.repository()
    for script in SCRIPTS:
        text = script.read_text()
        assert text == address.with_badge(text, script.stem, where), (
            "run: python -m docs.address"
        )
        assert ("Open in Colab" in text) == (where is not None)
    citation = (ROOT / "CITATION.cff").read_text()
    assert citation == address.with_code(citation, where), "run: python -m docs.address"
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md", "notebooks/*.*"):
        for path in ROOT.glob(pattern):
            assert not re.search("[A-Z]+/optax_mtl", path.read_text()), path


def test_a_badge_for_an_address():
    script = "# %% [markdown]\n# # Title\n"
    with_it = address.with_badge(script, "quickstart", "https://github.com/me/mine")
    assert "github/me/mine/blob/main/notebooks/quickstart.ipynb)" in with_it
    assert address.with_badge(with_it, "quickstart", None) == script
    assert address.with_badge(with_it, "quickstart", "https://github.com/me/mine") == (
        with_it
    )
