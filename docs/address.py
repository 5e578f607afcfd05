"""Writes the project's public address wherever a reader clicks on it.

    python -m docs.address

The address is ``Repository`` in ``[project.urls]`` of pyproject.toml. Without it there
is no badge that leads nowhere; once it is filled in, this adds one to every notebook
and the address to CITATION.cff. The tests say when it has to be run.
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
COLAB = "https://colab.research.google.com"
BADGE = re.compile(rf"# \[!\[Open in Colab\]\({COLAB}/[^\n]*\n#\n")
CODE = re.compile(r"^repository-code: .*\n", re.MULTILINE)


def repository() -> str | None:
    """The address in pyproject.toml, if it is filled in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


def with_badge(script: str, name: str, address: str | None) -> str:
    """A notebook's script with the badge of its address, or without one."""
    bare = BADGE.sub("", script)
    if address is None:
        return bare
    path = f"{address.removeprefix('https://github.com/')}/blob/main/notebooks"
    image, target = "assets/colab-badge.svg", f"github/{path}/{name}.ipynb"
    badge = f"# [![Open in Colab]({COLAB}/{image})]({COLAB}/{target})\n#\n"
    return bare.replace("# %% [markdown]\n", f"# %% [markdown]\n{badge}", 1)


def with_code(citation: str, address: str | None) -> str:
    """The citation file with the address, or without one."""
    bare = CODE.sub("", citation)
    return bare if address is None else f"{bare}repository-code: {address}\n"


def main() -> None:
    import jupytext

    address = repository()
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        script = path.read_text()
        path.write_text(with_badge(script, path.stem, address))
        notebook = jupytext.read(path.with_suffix(".ipynb"))
        for cell, new in zip(notebook.cells, jupytext.read(path).cells, strict=True):
            cell.source = new.source
        jupytext.write(notebook, path.with_suffix(".ipynb"))
    citation = ROOT / "CITATION.cff"
    citation.write_text(with_code(citation.read_text(), address))


if __name__ == "__main__":
    main()
