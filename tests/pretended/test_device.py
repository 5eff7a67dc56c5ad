"""The simulated device separates devices, computes exactly, counts waits and records graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.pretended.device import DEVICE, DeviceTensor, Tape, waits


def test_devices_are_separated(pretended) -> None:
    on_device, on_host = torch.ones(3, device=DEVICE), torch.ones(3)
    assert on_device.device == DEVICE
    assert (2 * on_device).tolist() == [2.0, 2.0, 2.0]
    assert (on_device * torch.tensor(3.0)).tolist() == [3.0, 3.0, 3.0]  # a scalar on the host is allowed, as on a GPU
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        on_device + on_host


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: x[x > 0], "index"),
        (lambda x: torch.zeros(3).to(DEVICE), "_to_copy"),
        (lambda x: torch.tensor([1.0, 2.0], device=DEVICE), "torch.tensor"),
    ],
)
def test_waits_are_counted_and_cannot_be_captured(pretended, act, name: str) -> None:
    x = torch.ones(3, device=DEVICE)
    before = sum(waits.values())
    act(x)
    assert sum(waits.values()) > before
    with pytest.raises(RuntimeError, match="not permitted while a graph is captured"):
        Tape().capture(lambda: act(x))


def test_asynchronous_operations_are_not_counted(pretended) -> None:
    x = torch.ones(3, device=DEVICE)
    waits.clear()
    x.copy_(torch.zeros(3), non_blocking=True)
    y = torch.where(x > 0, x, torch.full_like(x, 2.0)).index_select(0, torch.zeros_like(x, dtype=torch.int64))
    assert not waits
    assert y.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_conversion_to_the_type_of_another_tensor(mode, pretended) -> None:
    with mode():
        on_device, number = torch.ones(3, dtype=torch.int64).to(DEVICE), torch.tensor(2)
        like = torch.ones(3).to(DEVICE)
        found = on_device.to(like) * number.to(like)
        assert (found.dtype, found.device) == (torch.float32, DEVICE)
        assert (found + like).tolist() == [3.0, 3.0, 3.0]


def test_tape_replays_a_training_step(pretended) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).to(DEVICE)
    data = [torch.randn(6, 4).to(DEVICE) for _ in range(4)]
    rate = torch.full((), 0.1, dtype=torch.float64, device=DEVICE)

    def train(captured: bool) -> list[list[float]]:
        torch.manual_seed(1)
        copy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).to(DEVICE)
        copy.load_state_dict(network.state_dict())
        optimizer = torch.optim.Adam(copy.parameters(), lr=rate if captured else 0.1, fused=True)
        x = torch.zeros_like(data[0])

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = copy(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        replay = None
        for number, batch in enumerate(data):
            x.copy_(batch)
            for group in optimizer.param_groups:
                new = 0.1 / (1 + number)
                group["lr"] = group["lr"].fill_(new) if captured else new
            if captured and number == 1:
                _, replay = Tape().capture(step)  # recording executes the step, too
            elif replay is not None:
                replay()
            else:
                step()
        return [parameter.detach().cpu().tolist() for parameter in copy.state_dict().values()]

    assert train(True) == train(False)


def test_parameters_are_on_the_device(pretended) -> None:
    layer = nn.Linear(2, 2).to(DEVICE)
    assert all(isinstance(parameter.data, DeviceTensor) for parameter in layer.parameters())
