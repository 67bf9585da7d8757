"""Sphinx configuration: Markdown pages, and the API from the docstrings."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from math_core import LatexToMathML
from sphinx.errors import ExtensionError

project = "l2rw_ext"
author = "the l2rw_ext authors"
project_copyright = f"2026, {author}"
release = version = metadata.version("l2rw_ext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist", "dollarmath"]
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
html_static_path = ["_static"]
html_css_files = ["tables.css"]
# Equations become MathML when the pages are built. Browsers render it themselves, so that no page
# loads a script from another host; a command that is not known to the converter ends the build.
html_math_renderer = "mathml"
_LATEX = LatexToMathML(fancy_error=False)
_LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["'](?:https?:)?//"""
    r"""|url\(\s*["']?(?:https?:)?//"""
)
"""What a page or a style sheet loads from another host; links that a reader follows are none."""


def _escape_starred_shapes(
    app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]
) -> None:
    """A star in a shape, as in (n, C, *s), opens no emphasis."""
    lines[:] = [re.sub(r"(?<=, )\*(?=\w+[,)])", r"\*", line) for line in lines]


def _equation(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """The visitor of both kinds of equations, within a line and displayed."""
    displayed = isinstance(node, nodes.math_block)
    mathml = _LATEX.convert_with_local_state(node.astext(), displaystyle=displayed)
    translator.body.append(f'<div class="math">{mathml}</div>' if displayed else mathml)
    raise nodes.SkipNode


def _check_offline(app: Any, exception: Exception | None) -> None:
    """A page that loads a script, a style, a font or a picture from another host is an error."""
    for path in () if exception else Path(app.outdir).rglob("*"):
        found = path.suffix in (".html", ".css") and _LOADED.search(path.read_text())
        if found:
            raise ExtensionError(f"{path.name} loads from another host: {found[0]}")


def setup(app: Any) -> None:
    """Connect what this file adds to the HTML builder and to autodoc."""
    app.add_html_math_renderer("mathml", (_equation, None), (_equation, None))
    app.connect("autodoc-process-docstring", _escape_starred_shapes)
    app.connect("build-finished", _check_offline)
