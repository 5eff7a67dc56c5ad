"""Help for the settings of one class: `lkd fit --model.help CLASS`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from importlib import import_module
from textwrap import fill
from types import ModuleType
from typing import Any, NamedTuple

from docstring_parser import parse

from lkd.cli.catalogue import OF_CLASSES, homes_of, summaries
from lkd.modules.hyperparameters import arguments_of

_WIDTH = 80
_LONGEST = 60  # default values with more characters are not shown


class Setting(NamedTuple):
    """Argument of a class or function.

    Attributes:
        name: Its name.
        type: Its type annotation.
        default: Its default value, `required` if it has none, or empty if the default value is a function.
        description: Its description in the docstring.
    """

    name: str
    type: str
    default: str
    description: str


def class_help(path: str, homes: Sequence[str]) -> str:
    """Return the summary of a class and its settings, with types, default values and descriptions.

    Args:
        path: Import path of a class or function, or its name.
        homes: Packages that are searched for a name without import path.

    Raises:
        ValueError: If the class is not found.
    """
    kind = _found(path, homes)
    lines = [f"{_path(kind)}", "", *_paragraph(parse(inspect.getdoc(kind) or "").short_description or "", ""), ""]
    for one in settings(kind):
        default = {"required": " (required)", "": ""}.get(one.default, f" = {one.default}")
        lines.append(f"  {one.name}: {one.type}{default}")
        lines += _paragraph(one.description, "      ")
    return "\n".join(lines) + "\n"


def settings(kind: Any) -> list[Setting]:
    """Return the arguments of a class or function, including those that it forwards to a base class.

    Args:
        kind: A class or function.
    """
    texts = _descriptions(kind)
    return [Setting(one.name, _type(one), _default(one), texts.get(one.name, "")) for one in _parameters(kind)]


def _found(path: str, homes: Sequence[str]) -> Any:
    above, _, name = path.rpartition(".")
    modules = [_module(home) for home in ([above] if above else homes)]
    for module in modules:
        if hasattr(module, name):
            return getattr(module, name)
    for setting in () if above else OF_CLASSES:
        if any(name in summaries(home) for home in homes_of(setting) if home.startswith("lkd.")):
            raise ValueError(f"{name} is not one of these classes; see lkd fit --{setting}.help {name}")
    nearest = difflib.get_close_matches(name, [known for module in modules for known in dir(module)], n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "give an import path such as lkd.DistillModule"
    where = " or ".join(module.__name__ for module in modules)
    raise ValueError(f"there is no {name!r}{f' in {where}' if where else ''}; {hint}")


def _module(path: str) -> ModuleType:
    try:
        return import_module(path)
    except ImportError as error:
        raise ValueError(f"there is no module {path!r}; give an import path such as lkd.DistillModule") from error


def _path(kind: Any) -> str:
    """Return the shortest import path of a class or function."""
    parts = kind.__module__.split(".")
    homes = (".".join(parts[:number]) for number in range(1, len(parts) + 1))
    home = next(home for home in homes if getattr(import_module(home), kind.__name__, None) is kind)
    return f"{home}.{kind.__name__}"


def _parameters(kind: Any) -> list[inspect.Parameter]:
    if inspect.isclass(kind):
        return list(arguments_of(kind).values())
    return list(inspect.signature(kind).parameters.values())


def _descriptions(kind: Any) -> dict[str, str]:
    """Return the descriptions of the arguments from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for owner in kind.__mro__ if inspect.isclass(kind) else (kind,):
        for text in (owner.__doc__, getattr(vars(owner).get("__init__"), "__doc__", None)):
            for parameter in parse(text or "").params:
                found.setdefault(parameter.arg_name, " ".join((parameter.description or "").split()))
    return found


def _type(parameter: inspect.Parameter) -> str:
    text = "any" if parameter.annotation is parameter.empty else inspect.formatannotation(parameter.annotation)
    return text.strip("'\"")  # quoted annotations


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    if callable(parameter.default):
        return ""
    text = repr(parameter.default)
    return text if len(text) <= _LONGEST else "..."


def _paragraph(text: str, indent: str) -> list[str]:
    return [fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)] if text else []
