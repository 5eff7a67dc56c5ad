"""Values that are constants in a captured graph: Python numbers, modes of layers, and addresses of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, np.generic, Enum)
_NOT_READ = (frozenset(vars(nn.Module())) - {"training"}) | {"flushes"}
"""Attributes of modules that are not numbers, or that no step reads."""


def constants_of(module: Any) -> tuple[Any, ...]:
    """Return the values in the networks of a module that are constants in a graph.

    These are the numbers and modes of the layers, and the addresses and `requires_grad` of parameters and buffers.

    Args:
        module: A `ClassificationModule`.
    """
    criterion = getattr(module, "criterion", None)
    networks = [getattr(module, name) for name in module.network_names] + ([] if criterion is None else [criterion])
    layers = [layer for network in networks for layer in network.modules()]
    tensors = chain.from_iterable(chain(network.parameters(), network.buffers()) for network in networks)
    places = [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
    return [numbers_of(layer) for layer in layers], places, id(getattr(module, "teacher_extractor", None))


def plain(value: Any) -> Any:
    """Reduce a value to its numbers and strings; everything else is replaced by its type.

    Args:
        value: Any value. Lists, tuples, dicts, and CPU tensors with a single number are converted recursively.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(plain(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, plain(part)) for name, part in value.items() if isinstance(name, _PLAIN))
    if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu":
        return value.item()
    return type(value)


def numbers_of(part: nn.Module, public: bool = False) -> tuple[Any, ...]:
    """Return the names and values of the numbers and strings among the attributes of a module.

    Args:
        part: Any module.
        public: Whether to include public attributes only, as for a LightningModule.
    """
    attributes, counts = attributes_of(part, public)
    return tuple((name, plain(value)) for name, value in attributes.items() if counts(name))


class Watched:
    """Numbers in dicts, such as attributes of objects, whose changes are detected in every step.

    A comparison of all numbers takes a few microseconds.

    Args:
        owners: Pairs of a dict and a function that returns whether a name is included.
    """

    def __init__(self, owners: Iterable[tuple[dict[str, Any], Callable[[str], bool]]]) -> None:
        watched = [(owner, name, value) for owner, counts in owners for name, value in owner.items() if counts(name)]
        self._values = [(owner, name, value) for owner, name, value in watched if not _can_change(value)]
        self._others = [(owner, name, plain(value)) for owner, name, value in watched if _can_change(value)]

    def are_unchanged(self) -> bool:
        """Return whether all numbers still exist and are unchanged."""
        for owner, name, value in self._values:
            found = owner.get(name)
            if found is not value and plain(found) != plain(value):
                return False
        return all(plain(owner.get(name)) == value for owner, name, value in self._others)


def _can_change(value: Any) -> bool:
    """Return whether the numbers in an object can change while the object remains the same."""
    return isinstance(value, (list, tuple, dict, Tensor))


def attributes_of(part: nn.Module, public: bool = False) -> tuple[dict[str, Any], Callable[[str], bool]]:
    """Return the attributes of a module and a function that selects those to compare, for `Watched`.

    Args:
        part: Any module.
        public: Whether to include public attributes only, as for a LightningModule.
    """
    return vars(part), lambda name: name not in _NOT_READ and not (public and name.startswith("_"))


def first_difference(before: Any, after: Any, name: str = "an attribute") -> str:
    """Return the name of the first attribute whose value differs; empty if all are equal.

    Args:
        before: Result of `numbers_of` or a similar function.
        after: Result of the same function at a later time.
        name: Name for a difference outside of named attributes.
    """
    if before == after:
        return ""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after):
        if len(before) == 2 and isinstance(before[0], str) and before[0] == after[0]:
            return first_difference(before[1], after[1], f"{before[0]!r}") or name
        return next((found for pair in zip(before, after, strict=True) if (found := first_difference(*pair, name))), "")
    return f"{name} ({before} to {after})" if isinstance(before, _PLAIN) and isinstance(after, _PLAIN) else name
