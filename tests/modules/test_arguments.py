"""Arguments that modules forward to their base class."""

from __future__ import annotations

import inspect

import lightning as L
import pytest
from jsonargparse import ArgumentParser

import lkd.modules
from lkd.cli.class_help import settings

MODULES = [
    kind
    for name in lkd.modules.__all__
    if inspect.isclass(kind := getattr(lkd.modules, name)) and issubclass(kind, L.LightningModule)
]


@pytest.mark.parametrize("kind", MODULES)
def test_command_line_and_help_list_the_same_arguments(kind: type[L.LightningModule]) -> None:
    """jsonargparse reads the source code, lkd uses `replaced_arguments`; both find the same arguments."""
    found = settings(kind)
    assert {one.name for one in found} == {name.removeprefix("m.") for name in _arguments(kind)}
    assert all(one.description for one in found)


def _arguments(kind: type[L.LightningModule]) -> list[str]:
    return ArgumentParser(exit_on_error=False).add_class_arguments(kind, "m")


def test_replaced_arguments_are_rejected(tiny) -> None:
    with pytest.raises(TypeError, match="model_ckpt"):
        lkd.DistillModule(tiny(), tiny(), model_ckpt="weights.pt")
