"""Dense criteria never wait for the device, and their captured steps equal ordinary ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd import Outputs
from tests.losses.cases import SegmentationCase, changed, tensors, value
from tests.losses.collected import FEATURE_CASES
from tests.pretended.device import NAME, Tape, waits

CASES = {name: case for name, case in FEATURE_CASES.items() if isinstance(case, SegmentationCase)}


class _Step:
    """A step that computes the loss and the gradients of a criterion for static inputs."""

    def __init__(self, case: SegmentationCase, device: str) -> None:
        self.criterion = case.criterion().to(device)
        self.student, self.teacher = (changed(outputs, lambda tensor: tensor.to(device)) for outputs in case.outputs())
        self.student = changed(self.student, lambda tensor: tensor.detach().requires_grad_())
        batch = case.batch()
        self.batch = batch._replace(target=batch.target.to(device), index=batch.index.to(device))
        self.found = torch.zeros((), device=device)

    def __call__(self) -> None:
        for tensor in tensors(self.student):
            tensor.grad = None
        loss = value(self.criterion, self.student, self.teacher, self.batch)
        loss.backward()
        self.found.copy_(loss.detach())

    def change(self, outputs: tuple[Outputs, Outputs]) -> None:
        """Copy new inputs into the static ones."""
        with torch.no_grad():
            for own, other in zip((self.student, self.teacher), outputs, strict=True):
                for tensor, new in zip(tensors(own), tensors(other), strict=True):
                    tensor.copy_(new)

    def state(self) -> list[Tensor]:
        """Return the loss, the gradients and the buffers (memory banks)."""
        grads = [tensor.grad for tensor in tensors(self.student) if tensor.grad is not None]
        return [tensor.detach().cpu() for tensor in (self.found, *grads, *self.criterion.buffers())]


@pytest.mark.parametrize("name", CASES)
def test_steps_do_not_wait_and_can_be_captured(name: str, pretended) -> None:
    case = CASES[name]
    on_cpu, on_device = (_Step(case, device) for device in ("cpu", NAME))
    on_cpu()
    waits.clear()
    on_device()
    assert not +waits
    on_cpu.change(case.outputs(seed=1))
    on_device.change(case.outputs(seed=1))
    on_cpu()
    _, replay = Tape().capture(on_device)
    torch.manual_seed(0)
    assert all(torch.equal(*pair) for pair in zip(on_cpu.state(), on_device.state(), strict=True))
    on_cpu.change(case.outputs(seed=2))
    on_device.change(case.outputs(seed=2))
    on_cpu()
    torch.manual_seed(0)
    replay()
    assert all(torch.equal(*pair) for pair in zip(on_cpu.state(), on_device.state(), strict=True))
