"""What lkd contains, one line each: read from the source, so that `lkd fit --help` need not import torch."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from textwrap import fill, shorten

_HOMES = {
    "model": ("lkd.modules",),
    "data": ("lkd.datamodules",),
    "criterion": ("lkd.losses",),
    "callbacks": ("lkd.callbacks",),
    "optimizer": ("torch.optim",),
    "lr_scheduler": ("lkd.schedules", "torch.optim.lr_scheduler"),
}
SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "checkpoint": "lkd.callbacks.BestCheckpoint",
    "last_checkpoint": "lkd.callbacks.LastCheckpoint",
    "speed": "lkd.callbacks.Speed",
    "teacher_cache": "lkd.callbacks.TeacherCache",
}
"""The class behind each section of a config that names none."""
_ENDS = {"lkd.modules": "Module", "lkd.datamodules": "DataModule"}  # of the names that a setting can have
_BASES = ("Optimizer", "LRScheduler")  # no setting can name them
_NETWORKS = ("student", "teacher", "students", "model")


def homes_of(setting: str) -> tuple[str, ...]:
    """Return the packages and modules that a setting's classes are in.

    Args:
        setting: A setting's name (`model`, `model.init_args.criterion`).

    Returns:
        Import paths; empty if the setting names no class.
    """
    above, _, name = setting.rpartition(".")
    return ("lkd.models",) if above and name in _NETWORKS else _HOMES.get(name, ())


def summaries(home: str) -> dict[str, str]:
    """Return what a setting can name of a package or module, with the first line of the docstrings.

    Args:
        home: Its import path. Only packages outside lkd are imported.
    """
    found = _own(home) if home.startswith("lkd.") else _imported(home)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _imported(home: str) -> dict[str, str]:
    module = import_module(home)
    kinds = {name: getattr(module, name) for name in module.__all__ if name not in _BASES}
    return {name: _summary(kind.__doc__) for name, kind in kinds.items() if isinstance(kind, type)}


def _own(home: str) -> dict[str, str]:
    path = Path(__file__).parent.parent / home.removeprefix("lkd.")
    package = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = _public(ast.parse(package.read_text(encoding="utf-8")))
    public = {name for name in names if name.endswith(_ENDS.get(home, ""))}
    kinds = (ast.ClassDef, ast.FunctionDef) if home == "lkd.models" else (ast.ClassDef,)
    found = {}
    for file in path.glob("*.py") if path.is_dir() else [package]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, kinds) and node.name in public and not _is_abstract(node):
                found[node.name] = _summary(ast.get_docstring(node))
    return found


def listed(home: str, width: int = 80) -> list[str]:
    """Return a line for each class that a setting can name of a package or module.

    Args:
        home: Its import path.
        width: Columns; longer lines are cut at a word.
    """
    rows = summaries(home)
    column = max(map(len, rows)) + 2
    return [f"  {name:{column}}{shorten(text, width - column - 2, placeholder=' ...')}" for name, text in rows.items()]


def indented(text: str, width: int = 80) -> str:
    """Return a text in lines of `width` columns that begin with two spaces."""
    return fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _summary(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


def _is_abstract(node: ast.ClassDef | ast.FunctionDef) -> bool:
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(isinstance(base, ast.Name) and base.id in ("ABC", "Protocol") for base in bases)


def _public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
