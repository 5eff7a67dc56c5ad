"""One-line summaries of lkd's classes, parsed from the source so that `lkd fit --help` does not import torch."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from textwrap import fill, shorten

_HOMES = {
    "model": ("lkd.modules",),
    "data": ("lkd.datamodules",),
    "criterion": ("lkd.losses",),
    "task": ("lkd.tasks",),
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
"""Class of each config section that has no `class_path`."""
_ENDS = {"lkd.modules": "Module", "lkd.datamodules": "DataModule"}  # suffixes of the classes that a setting can name
OF_CLASSES = tuple(_HOMES)
"""Settings that name a class."""
_BASES = ("Optimizer", "LRScheduler")  # abstract
_NETWORKS = ("student", "teacher", "students", "model")


def homes_of(setting: str) -> tuple[str, ...]:
    """Return the packages and modules that contain the classes of a setting.

    Args:
        setting: Name of a setting, such as `model` or `model.init_args.criterion`.

    Returns:
        Import paths; empty if the value of the setting is not a class.
    """
    above, _, name = setting.rpartition(".")
    return ("lkd.models",) if above and name in _NETWORKS else _HOMES.get(name, ())


def summaries(home: str) -> dict[str, str]:
    """Return the classes and functions of a package or module that a setting can name, with their summaries.

    Args:
        home: Import path. Only packages outside lkd are imported; lkd's own source is parsed.

    Returns:
        First line of the docstring by name, in alphabetical order.
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


def choices(home: str) -> dict[str, str]:
    """Return the `summaries` of a package or module without base classes, which only subclasses use."""
    return {name: text for name, text in summaries(home).items() if not text.startswith("Base class")}


def listed(home: str, width: int = 80) -> list[str]:
    """Return one line for each of the `choices` of a package or module.

    Args:
        home: Import path.
        width: Number of columns. Longer lines are truncated at a word boundary.
    """
    rows = choices(home)
    column = max(map(len, rows)) + 2
    return [f"  {name:{column}}{shorten(text, width - column - 2, placeholder=' ...')}" for name, text in rows.items()]


def indented(text: str, width: int = 80) -> str:
    """Wrap a text to `width` columns, with an indentation of two spaces."""
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
