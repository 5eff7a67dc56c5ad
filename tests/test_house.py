"""The house: imports point down only; no file grows out of hand; configs and lazy exports name what exists."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import lkd

PACKAGE = Path(lkd.__file__).parent
LEVEL = {
    "types": 0,
    "capture": 0,
    "devices": 0,
    "layers": 0,
    "store": 0,
    "checkpoint_io": 1,
    "untrusted": 0,
    "refused": 0,
    "answers": 1,
    "losses": 1,
    "functional": 1,
    "taps": 1,
    "models": 1,
    "datamodules": 1,
    "schedules": 1,
    "modules": 2,
    "callbacks": 2,
    "plain_yaml": 1,
    "pages": 1,
    "arguments": 3,
    "mistakes": 3,
    "processes": 3,
    "cli": 3,
    "new_images": 3,
    "run_config": 3,
    "seeds": 3,
    "listing": 3,
    "help": 1,
    "catalogue": 0,
    "class_help": 0,
    "config_files": 2,
    "early_checks": 3,
    "limits": 0,
    "run_folder": 3,
    "trained": 3,
    "compare": 3,
    "sweep": 3,
    "export": 3,
    "__main__": 3,
}
MAY_ALSO = {("functional", "losses"), ("store", "refused"), ("untrusted", "refused"), ("devices", "capture")}
FILES = sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(tree: ast.AST) -> set[str]:
    """Parts of lkd that a file imports: `from lkd.x import y`, `import lkd.x`, `from lkd import x`."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lkd":
            parts |= {alias.name for alias in node.names if alias.name in LEVEL}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lkd."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lkd.")}
    return parts


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "__init__.py" or path.parent != PACKAGE], ids=str
)
def test_imports_point_down(path: Path) -> None:
    own = _part(path)
    for part in _imported(ast.parse(path.read_text())) - {own}:
        allowed = LEVEL[part] < LEVEL[own] or LEVEL[part] == LEVEL[own] == 3
        assert allowed or (own, part) in MAY_ALSO, f"{path} (level {LEVEL[own]}) imports lkd.{part}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0]
            is_doc = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            start = doc.end_lineno if is_doc else node.lineno
            assert node.end_lineno - start < 40, f"{path}: {node.name} has {node.end_lineno - start} lines"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_asserted_in_the_package(path: Path) -> None:
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


def test_lazy_exports_are_all_there() -> None:
    homes = {name for names in lkd._HOMES.values() for name in names}
    assert homes | {"__version__"} == set(lkd.__all__)
    for name in lkd.__all__:
        assert getattr(lkd, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lkd.Nothing


@pytest.mark.parametrize("name", ["losses", "functional", "models", "datamodules", "modules", "callbacks"])
def test_exports_exist(name: str) -> None:
    module = importlib.import_module(f"lkd.{name}")
    assert module.__all__ == sorted(set(module.__all__), key=module.__all__.index)
    for export in module.__all__:
        assert hasattr(module, export)
