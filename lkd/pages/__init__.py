"""Self-contained HTML pages with a common style and embedded figures."""

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
    """Render a template. All text is escaped.

    Args:
        name: Name of a template in this folder.
        values: Variables of the template.

    Returns:
        HTML.
    """
    loader = PackageLoader("lkd", "pages")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(f"{name}.html").render(**values)


def as_svg(figure: Figure) -> Markup:
    """Convert a figure to SVG for embedding in HTML, with text stored as text.

    Args:
        figure: The figure.
    """
    file = io.StringIO()
    # A unique salt, because element ids must be unique within a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"lkd {next(_SALT)}"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Markup(file.getvalue()[file.getvalue().index("<svg") :])
