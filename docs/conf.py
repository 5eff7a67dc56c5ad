"""Sphinx settings. Docstrings are Markdown with $formulas$, which become MathML: no script and no network is needed.

Sphinx rather than MkDocs: its search also works in pages opened from a folder, and Material for MkDocs reaches the end
of its life in May 2027.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate

import lkd

project = "lkd"
author = copyright = "The lkd maintainers"
version = release = lkd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
html_theme = "furo"
html_title = "lkd"
html_static_path = [str(HERE / "static")]
html_css_files = ["style.css"]
html_copy_source = False
html_math_renderer = "mathml"


def _math(latex: str, display: str) -> str:
    return str(convert(latex, display=display))


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_math(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_math(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def _to_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Convert the Markdown of a docstring to reStructuredText."""
    text = "\n".join(lines)
    kept: list[str] = []

    def keep(rst: str) -> str:
        kept.append(rst)
        return f"\0{len(kept) - 1}\0"

    def display(found: re.Match[str]) -> str:
        return found[1] + keep(".. math:: " + " ".join(found[2].split())) + "\n"

    text = re.sub(r"(?m)^( *)\$\$(.+?)\$\$", display, text, flags=re.DOTALL)
    text = re.sub(
        r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", lambda found: keep(f"``{' '.join(found[1].split())}``"), text
    )
    text = re.sub(r"\$([^$\n]+(?:\n[^$\n]+)?)\$", lambda found: keep(f":math:`{' '.join(found[1].split())}`"), text)
    text = re.sub(r"(?<!\*)\*(?=\w)|(?<=\w)_(?=\W|$)|\|", lambda found: "\\" + found[0], text)
    text = re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], text)
    lines[:] = text.splitlines()


def _check_names(app: Sphinx, error: Exception | None) -> None:
    """Fail if the reference lacks a public name."""
    if error is None and app.builder.name == "html":
        documented = app.env.get_domain("py").objects  # type: ignore[attr-defined]
        names = generate.public_names()
        if missing := sorted(name for name in names if name not in documented or not generate.is_described(name)):
            raise SphinxError(f"public names without documentation: {', '.join(missing)}")


def setup(app: Sphinx) -> None:
    """Register formulas, docstrings and the check of public names."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _to_rst, priority=100)  # before napoleon
    app.connect("build-finished", _check_names)
