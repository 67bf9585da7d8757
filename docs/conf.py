"""Sphinx configuration: Markdown pages, and the API from the docstrings."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

project = "l2rw_ext"
author = "the l2rw_ext authors"
release = version = metadata.version("l2rw_ext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"l2rw_ext {release}"


def _escape_starred_shapes(
    app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]
) -> None:
    """A star in a shape, as in (n, C, *s), opens no emphasis."""
    lines[:] = [re.sub(r"(?<=, )\*(?=\w+[,)])", r"\*", line) for line in lines]


def setup(app: Any) -> None:
    """Connect what this file adds to autodoc."""
    app.connect("autodoc-process-docstring", _escape_starred_shapes)
