"""How Sphinx builds this site: ``make docs``."""

import importlib
import inspect
import pathlib
import re

import optax_mtl
from docs import address, thumbnails
from optax_mtl import catalog

HERE = pathlib.Path(__file__).parent
project = "optax_mtl"
release = optax_mtl.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "optax_mtl"
html_theme_options = {"repository_url": address.repository() or ""}

nitpicky = True
# Types of libraries whose own pages are not asked while this site is built.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jnp|numpy|np|optax|flax|nnx|collections|typing)(\..*)?"),
]
autodoc_typehints = "none"
autosummary_generate = True
nb_execution_mode = "off"  # The notebooks bring their outputs.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3


def write_pages(app):
    """A page for each family of methods, from its docstrings, and the gallery."""
    folder = HERE / "methods"
    folder.mkdir(exist_ok=True)
    for family in catalog.FAMILIES:
        text = importlib.import_module(f"optax_mtl.methods.{family}").__doc__
        title, text = text.split(": ", 1)
        methods = [n for n, row in catalog.METHODS.items() if row.family == family]
        documented = "".join(f".. autofunction:: {name}\n\n" for name in methods)
        text = (
            f"# {title}\n\n{text[0].upper() + text[1:]}\n\n"
            f"{_with_links(catalog.as_markdown(family))}\n\n"
            f"```{{eval-rst}}\n.. currentmodule:: optax_mtl\n\n{documented}```\n"
        )
        _write(folder / f"{family}.md", text)
    thumbnails.write(HERE / "gallery")


def describe_fields(app, what, name, obj, options, lines):
    """Lists the fields of a named tuple with the comments beside them."""
    if what == "class" and hasattr(obj, "_fields"):
        field = re.compile(r"^    (\w+): (?:[^#\n]*)#(.*)$", re.MULTILINE)
        found = field.findall(inspect.getsource(obj))
        lines += ["", *(f"- ``{name}``: {text.strip()}" for name, text in found), ""]


def skip_fields(app, what, name, obj, skip, options):
    """Whether to leave out a member: the fields are listed already."""
    return skip or type(obj).__name__ == "_tuplegetter"


def _with_links(table):
    """The table of the catalog, with links to where the methods are documented."""
    return re.sub(r"^\| `(\w+)`", r"| {func}`~optax_mtl.\1`", table, flags=re.MULTILINE)


def _write(path, text):
    """Only what is new, so that Sphinx builds again what changed alone."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", describe_fields)
    app.connect("autodoc-skip-member", skip_fields)
