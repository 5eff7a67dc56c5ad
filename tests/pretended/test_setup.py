"""Before training, the weights are on the CPU although Lightning reports the GPU as the module's device."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lkd import ClassificationModule, DistillModule
from lkd.losses import FitNet
from lkd.types import Normalization
from tests.pretended.device import DEVICE, NAME


def test_blank_inputs_are_on_the_device_of_the_weights(pretended, trainer, data, distill) -> None:
    """At 83cc414, this fails as training did on an H100: the blank input is on the GPU, the weights are not."""
    seen: list[torch.device] = []

    class Recorder(DistillModule):
        def build(self, example: Any) -> None:
            seen.append(example.device)
            super().build(example)

    module = distill(
        Recorder, criterion=FitNet(["layer1"], ["layer1"]), teacher_normalization=Normalization((0.5,) * 3, (0.5,) * 3)
    )
    trainer(accelerator=NAME, max_epochs=1).fit(module, data)
    assert seen[0].type == "cpu"
    assert module.example_input().device == next(module.student.parameters()).device


class OnTwoDevices(nn.Module):
    """A network with a buffer on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 4)
        self.scale = [torch.ones(4, device=DEVICE)]

    def buffers(self, recurse: bool = True) -> Any:
        return iter([*super().buffers(recurse), *self.scale])

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layer(image.flatten(1)) * self.scale[0]
        return logits


def test_several_devices_are_reported(pretended, trainer, data) -> None:
    with pytest.raises(ValueError, match=r"are on different devices \(cpu, pretended:0\); move them to one device"):
        trainer(max_epochs=1).fit(ClassificationModule(OnTwoDevices()), data)


def test_several_dtypes_are_reported(trainer, data, tiny) -> None:
    with pytest.raises(ValueError, match=r"have different dtypes \(float32, float64\); convert the network with"):
        trainer(max_epochs=1).fit(ClassificationModule(tiny().double()), data)


def test_wrong_number_of_channels_is_reported(trainer, data, tiny) -> None:
    with pytest.raises(ValueError, match=r"the number of channels .* must be the same in network and data"):
        trainer(max_epochs=1).fit(ClassificationModule(tiny(in_channels=1)), data)


def test_prediction_after_training(pretended, trainer, data, distill) -> None:
    module = distill()
    engine: L.Trainer = trainer(accelerator=NAME, max_epochs=1)
    engine.fit(module, data)
    assert torch.cat(engine.predict(module, data)).shape == (24, 4)
