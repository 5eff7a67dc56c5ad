from __future__ import annotations

import pytest
import torch

from lkd.modules.meter import Meter, ValueName

A, B = ValueName("term", "a"), ValueName("term", "b")


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_means_since_the_last_call() -> None:
    meter = Meter()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        meter.update({A: torch.tensor(value), B: torch.tensor(step)}, step)
    assert meter.means(_alone) == {A: 3.0, B: 1.0}
    assert meter.means(_alone) == {}
    meter.update({A: torch.tensor(5.0)}, 3)
    assert meter.means(_alone) == {A: 5.0}


def test_means_over_processes() -> None:
    meter = Meter()
    meter.update({A: torch.tensor(1.0), B: torch.tensor(2.0)}, 0)
    assert meter.means(lambda sums: torch.stack([sums, sums + 2])) == {A: 2.0, B: 3.0}


def test_first_non_finite_step() -> None:
    meter = Meter()
    for step, value in enumerate((1.0, float("inf"), 1.0, float("nan"))):
        meter.update({A: torch.tensor(value), B: torch.tensor(1.0)}, 10 + step)
    assert meter.first_bad(_alone) == {A: 11}
    elsewhere = torch.tensor([torch.inf, 7.0])
    assert meter.first_bad(lambda own: torch.stack([own, elsewhere])) == {A: 11, B: 7}
    meter.means(_alone)
    assert meter.first_bad(_alone) == {}


def test_new_names_reset_the_means() -> None:
    meter = Meter()
    meter.update({A: torch.tensor(9.0)}, 0)
    meter.update({A: torch.tensor(1.0), B: torch.tensor(2.0)}, 1)
    meter.update({A: torch.tensor(2.0), B: torch.tensor(2.0)}, 2)
    assert meter.means(_alone) == pytest.approx({A: 1.5, B: 2.0})


def test_values_keep_no_graph() -> None:
    meter = Meter()
    weight = torch.ones((), requires_grad=True)
    meter.update({A: weight * 2}, 0)
    assert not meter._waiting[0][1].requires_grad


def test_many_steps() -> None:
    meter = Meter()
    for step in range(150):
        meter.update({A: torch.tensor(float(step)), B: torch.tensor(torch.inf if step > 100 else 0.0)}, step)
    assert meter.first_bad(_alone) == {B: 101}
    assert meter.means(_alone) == {A: 74.5, B: torch.inf}


def test_state_is_restored() -> None:
    values = [torch.tensor(0.1 * step) for step in range(150)]  # more than are summed together
    whole, first = Meter(), Meter()
    for step, value in enumerate(values):
        whole.update({A: value}, step)
        if step < 100:
            first.update({A: value}, step)
    state = first.state(lambda part: torch.stack([part + 7, part]))  # this process is the second of two
    second = Meter()
    second.restore(state, 1, torch.device("cpu"))
    for step, value in enumerate(values[100:], 100):
        second.update({A: value}, step)
    assert second.means(_alone) == whole.means(_alone)
    empty = Meter()
    empty.restore(Meter().state(_alone), 0, torch.device("cpu"))
    assert empty.means(_alone) == {}


def test_a_state_of_lkd_0_1_is_not_restored() -> None:
    meter = Meter()
    meter.restore(
        {"names": ["loss"], "steps": [], "count": 3, "waiting": None, "sums": None, "first_bad": None},
        0,
        torch.device("cpu"),
    )
    meter.update({A: torch.tensor(5.0)}, 3)
    assert meter.means(_alone) == {A: 5.0}
