"""OFD: overhaul of feature distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkd import functional as KF
from lkd.losses import OFD
from lkd.models import resnet8
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import alike


def _norms() -> nn.Module:
    """Return a teacher with the BatchNorm layers n and m."""
    network = nn.Module()
    network.n, network.m = nn.BatchNorm2d(5), nn.BatchNorm2d(7)
    nn.init.constant_(network.m.bias, -1.0)
    return network


CASES = {
    "OFD": FeatureCase(
        lambda: OFD(*LAYERS, teacher_norms=["n", "m"]),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (7, 4, 4)},
        teacher_network=_norms,
        batch_mean=True,
    ),
    "OFD-sizes": FeatureCase(
        lambda: OFD(*LAYERS, teacher_norms=["n", "m"], layer_weights="equal"),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 8, 6)},
        teacher_network=_norms,
        batch_mean=True,
    ),
}


class _Norms(nn.Module):
    """A teacher with the fixture's BatchNorm layers."""

    def __init__(self, inputs: Values) -> None:
        super().__init__()
        for layer in parity.layers(inputs)[1]:
            number = layer.rpartition(".")[2]
            weight, bias = (inputs[f"teacher_bn.{number}.{kind}"] for kind in ("weight", "bias"))
            norm = nn.BatchNorm2d(len(weight)).double()
            norm.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
            self.add_module(f"norm{number}", norm)


def _ofd(inputs: Values, hyper: Hyper) -> Values:
    teacher = _Norms(inputs)
    criterion = OFD(*parity.layers(inputs), teacher_norms=list(dict(teacher.named_children())))
    parity.built(criterion, inputs, teacher=teacher)
    given = {key.removeprefix("params."): value for key, value in inputs.items() if key.startswith("params.")}
    loss = parity.terms(criterion, inputs, **given)["loss"]
    samples = len(inputs["student_features.0"])
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss, "loss.authors_sum": samples * loss}


PARITY = {"ofd": _ofd}


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.5), (-2.0, -1.0), (0.3, -0.7), (1e-4, -2.0)])
def test_margin_is_the_mean_of_negative_values(weight: float, bias: float) -> None:
    deviation = abs(weight)
    inside = torch.linspace(bias - 12 * deviation, min(bias + 12 * deviation, 0.0), 400_001, dtype=torch.float64)
    density = torch.exp(-(((inside - bias) / deviation) ** 2) / 2)
    mean = torch.trapezoid(inside * density, inside) / torch.trapezoid(density, inside)
    found = KF.ofd_margin(torch.tensor([weight], dtype=torch.float64), torch.tensor([bias], dtype=torch.float64))
    torch.testing.assert_close(found, mean.view(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("weight", "bias", "margin"),
    [(1.0, 9.0, -3.0), (1.0, -1e4, -1e4), (0.0, -2.0, -2.0), (0.0, 2.0, 0.0), (0.0, 0.0, 0.0), (1e-30, 1e4, -3e-30)],
)
def test_margin_at_the_limits(weight: float, bias: float, margin: float) -> None:
    found = KF.ofd_margin(torch.tensor([weight]), torch.tensor([bias]))
    torch.testing.assert_close(found, torch.tensor([margin]), rtol=1e-5, atol=0)


def test_margins_come_from_the_preceding_norms() -> None:
    network = resnet8(num_classes=5)
    nn.init.constant_(network.layer2[-1].bn2.bias, -1.0)
    criterion, _ = alike(OFD(), network)
    for number, block in enumerate((network.layer1[-1], network.layer2[-1], network.layer3[-1])):
        expected = KF.ofd_margin(block.bn2.weight.detach(), block.bn2.bias.detach())
        assert torch.equal(getattr(criterion, f"margin{number}"), expected)
    assert {name.partition(".")[0] for name in criterion.state_dict()} == {
        *(f"margin{number}" for number in range(3)),
        "connectors",
    }


def _batch_norm(network: nn.Module, change: str) -> nn.Module:
    network.get_submodule("layer3.0").bn2 = {
        "plain": nn.BatchNorm2d(64, affine=False),
        "group": nn.GroupNorm(2, 64),
    }[change]
    return network


def test_gradient_of_the_partial_distance() -> None:
    margin = torch.tensor([-1.0])

    def gradient(student: float, teacher: float) -> float:
        feature = torch.full((1, 1, 1, 1), student, requires_grad=True)
        (grad,) = torch.autograd.grad(KF.ofd_loss(feature, torch.full((1, 1, 1, 1), teacher), margin), feature)
        return float(grad)

    cases: dict[tuple[float, float], float] = {
        (0.0, -5.0): 2.0,  # towards the margin
        (-2.0, -5.0): 0.0,
        (0.0, -0.5): 1.0,  # towards the teacher
        (-0.7, -0.5): 0.0,
        (0.0, 0.5): -1.0,
        (1.0, 0.5): 1.0,
    }
    assert {case: gradient(*case) for case in cases} == cases


def test_teacher_maps_are_pooled_to_the_students_size() -> None:
    student: Tensor = torch.randn(2, 3, 4, 4)
    teacher = torch.randn(2, 3, 8, 8)
    margin = torch.full((3,), -1.0)
    assert torch.equal(
        KF.ofd_loss(student, teacher, margin),
        KF.ofd_loss(student, nn.functional.avg_pool2d(teacher, 2), margin),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: alike(OFD(teacher_norms=["@norm1"]), resnet8(num_classes=5)), r"reads 3 teacher layers .* got 1"),
        (lambda: alike(OFD(), _batch_norm(resnet8(num_classes=5), "plain")), "'layer3.0.bn2' is BatchNorm2d"),
        (lambda: alike(OFD(), _batch_norm(resnet8(num_classes=5), "group")), "'layer3.0.bn2' is GroupNorm"),
        (
            lambda: alike(OFD(["@preact1"], ["@preact1"], ["nothing"]), resnet8(num_classes=5)),
            "'nothing' does not exist",
        ),
        (
            lambda: alike(OFD(["@preact1"], ["@preact1"], ["@norm2"]), resnet8(num_classes=5)),
            r"has 32 channels, but the layer that OFD reads has 16",
        ),
    ],
)
def test_invalid_layers(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
