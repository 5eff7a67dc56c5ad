"""PAD: prime-aware adaptive distillation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lkd import functional as KF
from lkd.losses import PAD
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

CASES = {
    "PAD": FeatureCase(
        lambda: PAD(*LAYERS),
        student={"a": (6,), "b": (8,)},
        teacher={"c": (6,), "d": (5,)},
        batch_mean=True,
        min_samples=2,
    ),
}


class Constant(nn.Module):
    """A layer that returns the same tensor for any input."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, feature: Tensor) -> Tensor:
        return self.tensor


def _pad(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the predicted log-variance, not the layers that predict it."""
    criterion = parity.built(PAD(*parity.layers(inputs), eps=hyper["eps"]), inputs)
    criterion.log_variances[0] = Constant(inputs["log_variance"])
    return parity.terms(criterion, inputs)


PARITY = {"pad_l2": _pad}


@pytest.mark.parametrize("size", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_pad_at_extreme_variances(size: float) -> None:
    log_variance = torch.full((2, 3), size, requires_grad=True)
    student, teacher = torch.full((2, 3), 2.0, requires_grad=True), torch.zeros(2, 3)
    loss = KF.pad_loss(student, teacher, log_variance)
    loss.backward()
    bounded = math.exp(min(size, 80.0))
    assert loss.item() == pytest.approx(4 / (bounded + 1e-6) + size, rel=1e-5)
    assert log_variance.grad.isfinite().all()
    assert student.grad.isfinite().all()


def test_pad_projects_only_if_sizes_differ() -> None:
    sizes = {}
    for size in (6, 8):
        student, teacher = output_pair(draw(4, 6), draw(4, size))
        criterion = built(PAD(["a"], ["c"]), student, teacher)
        sizes[size] = sorted(name for name, _ in criterion.named_parameters())
    head = ["log_variances.0.0.weight", "log_variances.0.1.bias", "log_variances.0.1.weight"]
    assert sizes == {6: head, 8: [*head, "projectors.0.bias", "projectors.0.weight"]}


def test_invalid_layers() -> None:
    form = draw(4, 6, 2)
    with pytest.raises(ValueError, match=r"PAD reads .*, but the student layer returns .*; use another"):
        built(PAD(["a"], ["c"]), *output_pair(form, form))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match=r"eps must be greater than 0, got 0\.0"):
        PAD(eps=0.0)
