"""The gallery of notebooks: one card each, with its last figure as a thumbnail."""

import base64
import pathlib
import re

import jupytext

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def write(folder: pathlib.Path) -> None:
    """Copies the notebooks into a folder of the site, with cards that lead to them."""
    folder.mkdir(exist_ok=True)
    cards = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = jupytext.read(path)
        notebook.metadata.language_info = {"name": "python"}
        jupytext.write(notebook, folder / path.name)
        title, sentence = describe(notebook)
        figure = last_figure(notebook)
        image = ""
        if figure:
            (folder / f"{path.stem}.png").write_bytes(figure)
            image = f":img-top: {path.stem}.png\n"
        cards.append(
            f":::{{grid-item-card}} {title}\n:link: {path.stem}\n:link-type: doc\n"
            f"{image}\n{sentence}\n:::\n"
        )
    listed = "\n".join(path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")))
    (folder / "index.md").write_text(
        "# Gallery\n\nEvery notebook runs on a CPU in minutes, and ends with what it"
        " found, also where the plain sum wins.\n\n::::{grid} 1 2 3 3\n:gutter: 3\n\n"
        + "\n".join(cards)
        + f"::::\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )


def describe(notebook) -> tuple[str, str]:
    """The title of a notebook and the first sentence under it."""
    (text,) = [
        cell.source for cell in notebook.cells[:1] if cell.cell_type == "markdown"
    ]
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    paragraph = " ".join(text[title.end() :].split())
    return title[1], re.split(r"(?<=[.?!]) ", paragraph)[0]


def last_figure(notebook) -> bytes | None:
    """The last image among the outputs, if there are any."""
    images = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    return base64.b64decode(images[-1]) if images else None
