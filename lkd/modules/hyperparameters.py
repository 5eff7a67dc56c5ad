"""Which values a checkpoint stores as hyperparameters, and how optimizers are pickled."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import lightning as L
from torch import Tensor

from lkd._compat import tree_leaves


def is_plain(value: Any) -> bool:
    """Return whether a value contains only numbers, strings and `None`."""
    return all(type(leaf) in (bool, int, float, str, type(None)) for leaf in tree_leaves(value))


def is_safe(example: Any) -> bool:
    """Return whether a value contains only tensors, strings and containers, which `weights_only` loading can read."""
    if type(example) in (dict, list, tuple):
        return all(is_safe(part) for part in (example.values() if type(example) is dict else example))
    return type(example) in (Tensor, str)


def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return the arguments that a class accepts, including those that it forwards to its base as `**kwargs`.

    A class lists the arguments of its base that it sets itself in the attribute `replaced_arguments`.

    Args:
        kind: A class.

    Returns:
        A mapping from names to parameters, starting with those of the class itself.
    """
    accepted: dict[str, inspect.Parameter] = {}
    replaced: set[str] = set()
    for base, parameters in _constructors(kind):
        named = {name: one for name, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        accepted |= {name: one for name, one in named.items() if name not in replaced | set(accepted) | {"self"}}
        replaced |= set(vars(base).get("replaced_arguments", ()))
        if not any(one.kind == one.VAR_KEYWORD for one in parameters.values()):
            break
    return accepted


def inner_arguments(kind: type) -> list[str]:
    """Return the constructor arguments of the base classes that the class itself does not accept.

    If saved as hyperparameters, they would be passed to the class when it is loaded from a checkpoint.
    """
    names = {name for _, parameters in _constructors(kind) for name in parameters}
    return sorted(names - set(arguments_of(kind)))


def _constructors(kind: type) -> Iterator[tuple[type, dict[str, inspect.Parameter]]]:
    """Yield each class of the MRO that defines a constructor, with the parameters of the constructor."""
    for base in kind.__mro__:
        if inspect.isfunction(maker := vars(base).get("__init__")):
            yield base, dict(inspect.signature(maker).parameters)


def name_default(kind: type[L.LightningModule]) -> None:
    """Make the default optimizer of a class picklable, as strategies that spawn processes require.

    The default is a lambda, which the command line can print and override. Pickle looks it up by its name, `<lambda>`.
    """
    optimizer = inspect.signature(kind).parameters.get("optimizer")
    if optimizer is not None and getattr(optimizer.default, "__name__", "") == "<lambda>":
        setattr(kind, "<lambda>", optimizer.default)
