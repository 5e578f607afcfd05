"""Every link inside the repository leads somewhere, and the site shows every name."""

import inspect
import pathlib
import re

import pytest

import optax_mtl

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]
LINK = re.compile(r"\]\(([^)\s]+)\)|^```\{include\} (\S+)$", re.MULTILINE)


def anchors(page):
    """Headings as a browser finds them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()) for title in titles]
    return {re.sub(r"\s", "-", title.strip()) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(page):
    for found in LINK.findall(page.read_text()):
        (target,) = filter(None, found)
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_the_site_has_every_public_name():
    """Methods are on the pages of their families."""
    api = (ROOT / "docs" / "api.md").read_text()
    names = set(re.findall(r"^   (\w+)$", api, re.MULTILINE)) | {"METHODS"}
    public = {
        name
        for name, value in vars(optax_mtl).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and name not in optax_mtl.METHODS
    }
    assert public - names == set()


def test_the_site_has_every_family():
    text = (ROOT / "docs" / "methods.md").read_text()
    for family in optax_mtl.catalog.FAMILIES:
        assert f"\nmethods/{family}\n" in text
