"""The documentation site: ``make docs`` builds it into ``build/site``."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

project = "softdefend"
copyright = "The softdefend authors, Apache-2.0"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
html_theme = "furo"
html_title = f"softdefend {release}"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub makes them, to which the pages link

# Tutorials run on the CPU, each in a folder of its own; a cell that fails fails the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True  # a program's output in one block
programs = Path(sys.executable).parent  # softdefend itself, for cells that call it
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PATH=f"{programs}:{os.environ['PATH']}")

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

linkcheck_timeout = 20
linkcheck_anchors = False

_OUTSIDE = {
    "CONTRIBUTING.md": "contributing",
    "SECURITY.md": "security",
    "CHANGELOG.md": "changelog",
    "CODE_OF_CONDUCT.md": "conduct",
}
"""Pages beside ``docs/`` and the pages of the site that show them."""


def _link_inside(app: Sphinx, name: str, source: list[str]) -> None:
    """Lead links that are right in the repository to the same text on the site."""
    up = "../" * name.count("/")
    for page, shown in _OUTSIDE.items():
        source[0] = re.sub(rf"\]\((?:\.\./)+{page}", f"]({up}project/{shown}.md", source[0])
    if name == "methods":  # which is generated: the cards stand below it in the contents
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\nmethods/*\n```\n"


_COLON = "\0"


def _hide_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in an attribute's text for a type."""
    if what in ("attribute", "property", "data") and lines:
        lines[0] = lines[0].replace(": ", _COLON)


def _show_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ": ") for line in lines]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_inside)
    app.connect("autodoc-process-docstring", _hide_colon, priority=400)
    app.connect("autodoc-process-docstring", _show_colon, priority=600)
