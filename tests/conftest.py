from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import SGD

from lkd import DistillModule, SyntheticDataModule
from lkd.models import CIFARResNet


@pytest.fixture(autouse=True)
def _use_temporary_folder(tmp_path, monkeypatch) -> None:
    """Run each test in its own folder, which also holds its runs, data, predictions and caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LKD_CACHE", str(tmp_path / "lkd_cache"))


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """Return a function that creates networks small enough to train in a test."""

    def make(seed: int = 0, num_classes: int = 4, in_channels: int = 3) -> nn.Module:
        torch.manual_seed(seed)
        return CIFARResNet(8, (4, 4, 4, 4), num_classes, in_channels)

    return make


@pytest.fixture
def data() -> SyntheticDataModule:
    return SyntheticDataModule(
        num_classes=4, input_shape=(3, 8, 8), train_size=64, test_size=24, val_size=16, batch_size=16
    )


@pytest.fixture
def distill(tiny) -> Callable[..., DistillModule]:
    """Return a function that creates a module with a tiny student and another tiny network as teacher."""

    def make(kind: type[DistillModule] = DistillModule, **settings: Any) -> DistillModule:
        settings.setdefault("optimizer", lambda parameters: SGD(parameters, lr=0.1, momentum=0.9))
        return kind(tiny(seed=1), settings.pop("teacher", None) or tiny(seed=2), **settings)

    return make


@pytest.fixture
def trainer(tmp_path) -> Callable[..., L.Trainer]:
    def make(**settings: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **settings})

    return make
