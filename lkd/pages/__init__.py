"""Pages of HTML that need nothing else: one look, and figures inside."""

from __future__ import annotations

import io
from itertools import count
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

_SALT = count()


def rendered(name: str, **values: Any) -> str:
    """A page; every text in it is escaped.

    Args:
        name: The template's, in this folder.
        values: What it shows.

    Returns:
        HTML.
    """
    loader = PackageLoader("lkd", "pages")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(f"{name}.html").render(**values)


def as_svg(figure: Figure) -> Markup:
    """A figure as SVG that stands in HTML, its text as text.

    Args:
        figure: The figure.
    """
    file = io.StringIO()
    # A salt of its own: figures of one page must not share the names of their parts.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"lkd {next(_SALT)}"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Markup(file.getvalue()[file.getvalue().index("<svg") :])
