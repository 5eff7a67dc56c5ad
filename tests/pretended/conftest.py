from __future__ import annotations

from collections.abc import Iterator

import pytest
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lkd import devices
from tests.pretended.accelerator import PretendedStrategy
from tests.pretended.device import NAME, Pretend, Tape


@pytest.fixture
def pretended(monkeypatch) -> Iterator[Pretend]:
    """Provide the simulated device, which lkd treats as a GPU; `accelerator="pretended"` trains on it."""
    choose = _AcceleratorConnector._choose_strategy

    def strategy(self):
        return PretendedStrategy() if self._accelerator_flag == NAME else choose(self)

    monkeypatch.setattr(_AcceleratorConnector, "_choose_strategy", strategy)
    monkeypatch.setattr(devices, "is_gpu", lambda device: device.type == NAME)
    monkeypatch.setattr(devices, "free_memory", lambda device: 2**40)
    monkeypatch.setattr(devices, "step_capture", lambda device: Tape() if device.type == NAME else None)
    with Pretend() as mode:
        yield mode
