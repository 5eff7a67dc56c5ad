"""Criteria of dense prediction never wait for the device, and a graph of them computes what an ordinary step does."""

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
    """Loss and gradient of a criterion for static inputs."""

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
        """Give it other inputs, at the same addresses."""
        with torch.no_grad():
            for own, other in zip((self.student, self.teacher), outputs, strict=True):
                for tensor, new in zip(tensors(own), tensors(other), strict=True):
                    tensor.copy_(new)

    def state(self) -> list[Tensor]:
        """Loss, gradients and memories."""
        grads = [tensor.grad for tensor in tensors(self.student) if tensor.grad is not None]
        return [tensor.detach().cpu() for tensor in (self.found, *grads, *self.criterion.buffers())]


@pytest.mark.parametrize("name", CASES)
def test_steps_do_not_wait_and_can_be_captured(name: str, pretended) -> None:
    case = CASES[name]
    usual, there = (_Step(case, device) for device in ("cpu", NAME))
    usual()
    waits.clear()
    there()
    assert not +waits
    usual.change(case.outputs(seed=1))
    there.change(case.outputs(seed=1))
    usual()
    _, replay = Tape().capture(there)
    torch.manual_seed(0)
    assert all(torch.equal(*pair) for pair in zip(usual.state(), there.state(), strict=True))
    usual.change(case.outputs(seed=2))
    there.change(case.outputs(seed=2))
    usual()
    torch.manual_seed(0)
    replay()
    assert all(torch.equal(*pair) for pair in zip(usual.state(), there.state(), strict=True))
