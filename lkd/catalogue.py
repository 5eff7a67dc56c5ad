"""What lkd contains, one line each: read from the source, so that `lkd fit --help` need not import torch."""

from __future__ import annotations

import ast
from pathlib import Path
from textwrap import fill, shorten

_PARTS = {"model": "modules", "data": "datamodules", "criterion": "losses", "callbacks": "callbacks"}
_ENDS = {"modules": "Module", "datamodules": "DataModule"}  # of the names that a setting can have
_NETWORKS = ("student", "teacher", "students", "model")


def part_of(setting: str) -> str | None:
    """Return the subpackage that a setting's classes are in.

    Args:
        setting: A setting's name (`model`, `model.init_args.criterion`).

    Returns:
        The subpackage's name; None if lkd has none for that setting.
    """
    above, _, name = setting.rpartition(".")
    return "models" if above and name in _NETWORKS else _PARTS.get(name)


def summaries(part: str) -> dict[str, str]:
    """Return what a setting can name of a subpackage, with the first line of the docstrings.

    Args:
        part: The subpackage's name.
    """
    folder = Path(__file__).parent / part
    names = _public(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    public = {name for name in names if name.endswith(_ENDS.get(part, ""))}
    kinds = ast.ClassDef | ast.FunctionDef if part == "models" else ast.ClassDef
    found = {}
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kinds) and node.name in public and not _is_abstract(node):
                found[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def listed(part: str, width: int = 80) -> list[str]:
    """Return a line for each public name of a subpackage.

    Args:
        part: The subpackage's name.
        width: Columns; longer lines are cut at a word.
    """
    rows = summaries(part)
    column = max(map(len, rows)) + 2
    return [f"  {name:{column}}{shorten(text, width - column - 2, placeholder=' ...')}" for name, text in rows.items()]


def indented(text: str, width: int = 80) -> str:
    """Return a text in lines of `width` columns that begin with two spaces."""
    return fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _is_abstract(node: ast.ClassDef | ast.FunctionDef) -> bool:
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(isinstance(base, ast.Name) and base.id in ("ABC", "Protocol") for base in bases)


def _public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []
