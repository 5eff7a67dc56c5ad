"""Architecture: imports point downwards only, files are short, and configs and lazy exports name existing objects."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lkd
import lkd.losses
from tests.losses import collected

PACKAGE = Path(lkd.__file__).parent
LEVEL = {
    "__about__": 0,
    "_compat": -1,
    "_moved": 0,
    "types": 0,
    "io": 0,
    "devices": 0,
    "checkpoints": 1,
    "features": 1,
    "pages": 1,
    "schedules": 1,
    "losses": 2,
    "models": 2,
    "datamodules": 2,
    "tasks": 3,
    "functional": 3,
    "modules": 4,
    "callbacks": 5,
    "cli": 6,
    "loading": 6,
    "compare": 6,
    "export": 6,
    "sweep": 6,
    "__main__": 7,
}
TOP = 6
"""Level of the packages that may import each other: the commands build on the command line."""
FILES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    """Return a file's path within the package, for the name of a test."""
    return path.relative_to(PACKAGE).as_posix()


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(tree: ast.AST) -> set[str]:
    """Return the parts of lkd that a file imports with `from lkd.x import y`, `import lkd.x` or `from lkd import x`."""
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
    "path", [path for path in FILES if path.name != "__init__.py" or path.parent != PACKAGE], ids=_name
)
def test_imports_point_downwards(path: Path) -> None:
    own = _part(path)
    for part in _imported(ast.parse(path.read_text())) - {own}:
        allowed = LEVEL[part] < LEVEL[own] or LEVEL[part] == LEVEL[own] == TOP
        assert allowed, f"{path} (level {LEVEL[own]}) imports lkd.{part}"


def test_imports_have_no_cycles() -> None:
    """Imports between files have no cycles, including those in functions and those for types only."""
    imports = {_module(path): _imported_files(path) for path in FILES if path != PACKAGE / "__init__.py"}
    TopologicalSorter(imports).prepare()


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _imported_files(path: Path) -> set[str]:
    known, found = {_module(file) for file in FILES} - {"lkd"}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & known) - {_module(path)}


def test_top_level_files() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        *("__about__.py", "__init__.py", "__main__.py", "_compat.py", "_moved.py"),
        *("functional.py", "loading.py", "types.py"),
    }


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0]
            is_doc = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            start = doc.end_lineno if is_doc else node.lineno
            assert node.end_lineno - start < 40, f"{path}: {node.name} has {node.end_lineno - start} lines"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_package_contains_no_assert(path: Path) -> None:
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


def test_every_loss_has_tests() -> None:
    """Each loss file has a test file, with at least one case for each of its criteria and none for others."""
    assert set(collected.FILES) == {path.stem for path in PACKAGE.glob("losses/[!_]*.py")}
    rows = {
        method: {case.partition("-")[0] for case in getattr(file, "CASES", {})}
        for method, file in collected.FILES.items()
    }
    criteria: dict[str, set[str]] = {method: set() for method in collected.FILES}
    for name in set(lkd.losses.__all__) - {"DistillLoss", "CompositeLoss", "named_terms"}:
        criteria[getattr(lkd.losses, name).__module__.rpartition(".")[2]].add(name)
    assert rows == criteria


def test_lazy_exports_are_complete() -> None:
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
