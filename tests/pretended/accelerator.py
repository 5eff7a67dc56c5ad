"""Lightning accelerator for the simulated device: `accelerator="pretended"`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from tests.pretended.device import DEVICE, NAME


class PretendedAccelerator(Accelerator):
    """Accelerator with one simulated device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class PretendedStrategy(SingleDeviceStrategy):
    """Strategy that trains on the simulated device."""

    def __init__(self) -> None:
        super().__init__(DEVICE, accelerator=PretendedAccelerator())


StrategyRegistry.register(NAME, PretendedStrategy, description="One pretended device")
AcceleratorRegistry.register(NAME, PretendedAccelerator, description="One pretended device")
