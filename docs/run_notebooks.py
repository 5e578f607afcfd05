"""Runs notebooks in full size, and keeps their figures and texts in them.

python -m docs.run_notebooks                     # all of them, some 15 minutes
python -m docs.run_notebooks see_your_conflicts
"""

import argparse
import base64
import io
import os
import pathlib
import time

import jupytext
import nbclient
import nbformat
from PIL import Image

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    names = parser.parse_args().names or known
    os.environ["PYTHONPATH"] = str(NOTEBOOKS.parent)  # This checkout's library.
    for name in names:
        start = time.perf_counter()
        notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
        nbclient.NotebookClient(
            notebook, timeout=1200, resources={"metadata": {"path": NOTEBOOKS}}
        ).execute()
        clean(notebook)
        jupytext.write(notebook, NOTEBOOKS / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leaves nothing that differs from run to run but what the cells print and draw."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])


def smaller(figure: str) -> str:
    """The same figure, base64, in 128 colours: a third of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")
    out = io.BytesIO()
    image.quantize(128).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    main()
