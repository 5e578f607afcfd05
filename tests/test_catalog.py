"""The catalog, the exports, the docstrings and the README agree."""

import importlib
import inspect
import pathlib
import pkgutil

import pytest

import optax_mtl
from optax_mtl import catalog, methods, weights
from tests.common import every_method

README = pathlib.Path(__file__).parent.parent / "README.md"
SECTIONS = ("Returns:", "Examples:", "References:")


@every_method
def test_is_exported_and_documented(name):
    row = optax_mtl.METHODS[name]
    docstring = getattr(optax_mtl, name).__doc__
    missing = [s for s in SECTIONS if s not in docstring]
    if inspect.signature(getattr(optax_mtl, name)).parameters:
        missing += [s for s in ("Args:",) if s not in docstring]
    assert not missing
    title, _, address = row.paper
    assert (address or title) in docstring


@every_method
def test_row_is_of_the_known_kinds(name):
    row = optax_mtl.METHODS[name]
    assert row.family in {
        "baseline",
        "conflict",
        "balance",
        "loss",
        "priority",
        "robust",
    }
    assert row.reads <= {"gram", "losses", "gradients"}
    assert row.scale in {"sum", "mean", "own"}
    assert row.state in {"none", "tasks", "P", "T x P"}


def test_every_weights_function_has_a_short_name():
    found = set()
    for module in pkgutil.walk_packages(methods.__path__, "optax_mtl.methods."):
        names = vars(importlib.import_module(module.name))
        if module.name.endswith(".eagc"):
            continue  # Its weights are those of samples, not of tasks.
        own = {n for n, v in names.items() if inspect.isfunction(v)}
        found |= {n for n in own if n.endswith("_weights") and not n.startswith("_")}
    assert {n.removesuffix("_weights") for n in found} == set(weights.__all__)
    assert weights.__all__ == sorted(weights.__all__)


def test_readme_shows_the_table():
    table = catalog.families_as_markdown()
    assert table in README.read_text(), f"paste into README.md:\n\n{table}"


def test_how_to_choose_is_the_same_in_both_places():
    page = README.parent / "docs" / "choose.md"
    rows = page.read_text().split("| your situation |")[1].split("\n\n")[0]
    assert rows in README.read_text(), "copy the table of docs/choose.md into README.md"


def test_the_page_of_methods_shows_the_table():
    table = catalog.as_markdown()
    page = README.parent / "docs" / "methods.md"
    assert table in page.read_text(), f"paste into docs/methods.md:\n\n{table}"


def test_unknown_name():
    with pytest.raises(ValueError, match="did you mean 'cagrad'"):
        optax_mtl.get("cagard", 2)
    with pytest.raises(ValueError, match="known are"):
        optax_mtl.get("zzzz", 2)


def test_unknown_option():
    with pytest.raises(TypeError, match="no option 'radius'; known are c, clip, pref"):
        optax_mtl.get("cagrad", 2, radius=0.5)
    with pytest.raises(TypeError, match="did you mean 'num_byzantine'"):
        optax_mtl.get("krum", 5, num_byzantin=1)
    with pytest.raises(TypeError, match="mean has no option 'c'; known are none"):
        optax_mtl.get("mean", 2, c=1)


def test_public_names_have_docstrings():
    names = [n for n in vars(optax_mtl) if not n.startswith("_")]
    undocumented = [n for n in names if not getattr(optax_mtl, n).__doc__]
    assert not [n for n in undocumented if n != "METHODS"]
