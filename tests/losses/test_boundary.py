"""Margins and layer weights of the criteria that compare features before their activation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import AB, OFD, DistillLoss
from lkd.models import resnet8

WIDTHS = (16, 32, 64)


def _answers(layers: tuple[str, ...], widths: tuple[int, ...] = WIDTHS) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    pairs = zip(layers, widths, strict=True)
    return Outputs(
        torch.zeros(4, 5), {layer: torch.randn(4, width, 4, 4, generator=generator) for layer, width in pairs}
    )


def _built(criterion: DistillLoss, network: nn.Module) -> tuple[DistillLoss, Outputs]:
    """The criterion, whose student and teacher are the same network."""
    criterion.resolve_layers(network, network)
    answers = _answers(criterion.student_layers, WIDTHS[: len(criterion.student_layers)])
    criterion.build(Probe(network, answers), Probe(network, answers))
    return criterion, answers


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.5), (-2.0, -1.0), (0.3, -0.7), (1e-4, -2.0)])
def test_margin_is_the_mean_of_what_is_below_zero(weight: float, bias: float) -> None:
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


def test_margins_are_those_of_the_norms_in_front_of_the_layers() -> None:
    network = resnet8(num_classes=5)
    nn.init.constant_(network.layer2[-1].bn2.bias, -1.0)
    criterion, _ = _built(OFD(), network)
    for number, block in enumerate((network.layer1[-1], network.layer2[-1], network.layer3[-1])):
        expected = KF.ofd_margin(block.bn2.weight.detach(), block.bn2.bias.detach())
        assert torch.equal(getattr(criterion, f"margin{number}"), expected)
    assert {name.partition(".")[0] for name in criterion.state_dict()} == {
        *(f"margin{number}" for number in range(3)),
        "connectors",
    }


@pytest.mark.parametrize("kind", [AB, OFD])
def test_layers_weigh_what_they_are_to(kind: type[AB | OFD]) -> None:
    network, values = resnet8(num_classes=5), {}
    for weights in ("equal", "doubling", [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
        torch.manual_seed(0)
        criterion, answers = _built(kind(layer_weights=weights), network)
        values[str(weights)] = criterion(answers, answers, Batch(None, torch.zeros(4)))
    equal, doubling, *single = values.values()
    torch.testing.assert_close(equal, sum(single, torch.zeros(())))
    torch.testing.assert_close(doubling, single[0] / 4 + single[1] / 2 + single[2])


def test_only_the_teachers_sign_counts_for_ab() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(KF.ab_loss(student, teacher), KF.ab_loss(student, teacher.sign()))
    assert KF.ab_loss(1.01 * teacher.sign(), teacher) == 0


def _batch_norm(network: nn.Module, change: str) -> nn.Module:
    network.get_submodule("layer3.0").bn2 = {
        "plain": nn.BatchNorm2d(64, affine=False),
        "group": nn.GroupNorm(2, 64),
    }[change]
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _built(AB(layer_weights=[1.0, 2.0]), resnet8(num_classes=5)), "compares 3 layers but has 2"),
        (lambda: AB(layer_weights=[-1.0]), "must not be negative"),
        (lambda: AB(layer_weights=[float("inf")]), r"must not be negative, got \[inf\]; use finite numbers"),
        (lambda: AB(margin=0.0), "margin must be greater than 0"),
        (lambda: _built(OFD(teacher_norms=["@norm1"]), resnet8(num_classes=5)), r"reads 3 teacher layers .* got 1"),
        (lambda: _built(OFD(), _batch_norm(resnet8(num_classes=5), "plain")), "'layer3.0.bn2' is BatchNorm2d"),
        (lambda: _built(OFD(), _batch_norm(resnet8(num_classes=5), "group")), "'layer3.0.bn2' is GroupNorm"),
        (
            lambda: _built(OFD(["@preact1"], ["@preact1"], ["nothing"]), resnet8(num_classes=5)),
            "'nothing' does not exist",
        ),
        (
            lambda: _built(OFD(["@preact1"], ["@preact1"], ["@norm2"]), resnet8(num_classes=5)),
            r"has 32 channels, but the layer that OFD reads has 16",
        ),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_student_above_the_target_of_a_negative_teacher_is_pulled_down() -> None:
    margin = torch.tensor([-1.0])

    def gradient(student: float, teacher: float) -> float:
        feature = torch.full((1, 1, 1, 1), student, requires_grad=True)
        (grad,) = torch.autograd.grad(KF.ofd_loss(feature, torch.full((1, 1, 1, 1), teacher), margin), feature)
        return float(grad)

    cases: dict[tuple[float, float], float] = {
        (0.0, -5.0): 2.0,  # to the margin
        (-2.0, -5.0): 0.0,
        (0.0, -0.5): 1.0,  # to the teacher
        (-0.7, -0.5): 0.0,
        (0.0, 0.5): -1.0,
        (1.0, 0.5): 1.0,
    }
    assert {case: gradient(*case) for case in cases} == cases


def test_the_teachers_map_is_brought_to_the_students_size() -> None:
    student: Tensor = torch.randn(2, 3, 4, 4)
    teacher = torch.randn(2, 3, 8, 8)
    margin = torch.full((3,), -1.0)
    assert torch.equal(
        KF.ofd_loss(student, teacher, margin),
        KF.ofd_loss(student, nn.functional.avg_pool2d(teacher, 2), margin),
    )
