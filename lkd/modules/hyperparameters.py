"""Which values a checkpoint stores as hyperparameters, and how optimizers are pickled."""

from __future__ import annotations

import inspect
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


def name_default(kind: type[L.LightningModule]) -> None:
    """Make the default optimizer of a class picklable, as strategies that spawn processes require.

    The default is a lambda, which the command line can print and override. Pickle looks it up by its name, `<lambda>`.
    """
    optimizer = inspect.signature(kind).parameters.get("optimizer")
    if optimizer is not None and getattr(optimizer.default, "__name__", "") == "<lambda>":
        setattr(kind, "<lambda>", optimizer.default)
