from __future__ import annotations

import pytest
import torch

from lkd.modules.meter import Meter


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_means_since_the_last_reading() -> None:
    meter = Meter()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        meter.update({"a": torch.tensor(value), "b": torch.tensor(step)}, step)
    assert meter.means(_alone) == {"a": 3.0, "b": 1.0}
    assert meter.means(_alone) == {}
    meter.update({"a": torch.tensor(5.0)}, 3)
    assert meter.means(_alone) == {"a": 5.0}


def test_means_over_processes() -> None:
    meter = Meter()
    meter.update({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 0)
    assert meter.means(lambda sums: torch.stack([sums, sums + 2])) == {"a": 2.0, "b": 3.0}


def test_first_step_that_is_not_finite() -> None:
    meter = Meter()
    for step, value in enumerate((1.0, float("inf"), 1.0, float("nan"))):
        meter.update({"a": torch.tensor(value), "b": torch.tensor(1.0)}, 10 + step)
    assert meter.first_bad(_alone) == {"a": 11}
    elsewhere = torch.tensor([torch.inf, 7.0])
    assert meter.first_bad(lambda own: torch.stack([own, elsewhere])) == {"a": 11, "b": 7}
    meter.means(_alone)
    assert meter.first_bad(_alone) == {}


def test_other_names_start_again() -> None:
    meter = Meter()
    meter.update({"a": torch.tensor(9.0)}, 0)
    meter.update({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 1)
    meter.update({"a": torch.tensor(2.0), "b": torch.tensor(2.0)}, 2)
    assert meter.means(_alone) == pytest.approx({"a": 1.5, "b": 2.0})


def test_values_keep_no_graph() -> None:
    meter = Meter()
    weight = torch.ones((), requires_grad=True)
    meter.update({"a": weight * 2}, 0)
    assert not meter._waiting[0][1].requires_grad


def test_many_steps() -> None:
    meter = Meter()
    for step in range(150):
        meter.update({"a": torch.tensor(float(step)), "b": torch.tensor(torch.inf if step > 100 else 0.0)}, step)
    assert meter.first_bad(_alone) == {"b": 101}
    assert meter.means(_alone) == {"a": 74.5, "b": torch.inf}


def test_goes_on_from_its_state() -> None:
    values = [torch.tensor(0.1 * step) for step in range(150)]  # more than are summed together
    whole, first = Meter(), Meter()
    for step, value in enumerate(values):
        whole.update({"a": value}, step)
        if step < 100:
            first.update({"a": value}, step)
    state = first.state(lambda part: torch.stack([part + 7, part]))  # of two processes, this is the second
    second = Meter()
    second.restore(state, 1, torch.device("cpu"))
    for step, value in enumerate(values[100:], 100):
        second.update({"a": value}, step)
    assert second.means(_alone) == whole.means(_alone)
    empty = Meter()
    empty.restore(Meter().state(_alone), 0, torch.device("cpu"))
    assert empty.means(_alone) == {}
