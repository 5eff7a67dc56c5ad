"""CrossKD: cross-head knowledge distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkd import Batch, Probe
from lkd import functional as KF
from lkd.losses import CrossKD
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, outputs


def _heads() -> nn.Module:
    """Return a network with a detector's heads, for classes and for boxes."""
    network = nn.Module()
    network.norm = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    network.classes = nn.Sequential(network.norm, nn.Conv2d(6, 3, 1)).eval()
    network.boxes = nn.Conv2d(5, 4 * 4, 3, padding=1)
    return network


BATCH = Batch(None, torch.zeros(2, dtype=torch.int64))

CASES = {
    "CrossKD": FeatureCase(
        lambda: CrossKD(*LAYERS, "classes", teacher_box_head="boxes"),
        student={"a": (5, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (5, 6, 4)},
        teacher_network=_heads,
    ),
    "CrossKD-branches": FeatureCase(
        lambda: CrossKD(["a"], ["c"], "classes", ["b"], ["d"], "boxes", beta=2.0, temperature=2.0),
        student={"a": (5, 8, 8), "b": (5, 8, 8)},
        teacher={"c": (5, 8, 8), "d": (5, 8, 8)},
        teacher_network=_heads,
    ),
    "CrossKD-classes": FeatureCase(
        lambda: CrossKD(["a"], ["c"], "classes"),
        student={"a": (4, 8, 8)},
        teacher={"c": (5, 8, 8)},
        teacher_network=_heads,
    ),
}


def _crosskd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the predictions of the heads and the weights of the positions."""

    def rows(name: str) -> Tensor:
        return inputs[name].movedim(1, 3).flatten(0, 2)

    weight = inputs["label_weights"].flatten()
    logits = rows("student_cls"), rows("teacher_cls")
    quality = logits[1].amax(1).sigmoid() * (weight != 0)
    cls = KF.crosskd_class_loss(*logits, weight, hyper["beta"], hyper["avg_factor"])
    reg = KF.crosskd_box_loss(rows("student_reg"), rows("teacher_reg"), quality, hyper["temperature"])
    aligned = KF.crosskd_aligned(inputs["student_feature"], inputs["teacher_feature"])
    terms = {"cls": hyper["cls_weight"] * cls, "reg": hyper["reg_weight"] * reg}
    return {**terms, "loss": terms["cls"] + terms["reg"], "aligned": aligned}


PARITY = {"crosskd": _crosskd}


class _Detector(nn.Module):
    """A teacher with detection heads."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.boxes = nn.Conv2d(5, 8, 1)
        self.tokens = nn.Flatten()
        self.three = nn.Conv2d(5, 3, 1)


def test_crosskd_equals_its_functions() -> None:
    """The teacher's heads read both features and get no gradient, even though their parameters require one."""
    torch.manual_seed(0)
    teacher = _Detector().double().eval()
    ours, theirs = (draw(2, 5, 4, 3, seed=seed) for seed in (0, 1))
    given = outputs(a=ours.requires_grad_()), outputs(c=theirs)
    criterion = built(
        CrossKD(["a"], ["c"], "classes", teacher_box_head="boxes", temperature=2.0), *given, (nn.Identity(), teacher)
    )
    found = criterion(*given, BATCH)
    aligned = KF.crosskd_aligned(ours, theirs)
    rows = [
        [head(feature).movedim(1, 3).flatten(0, 2) for feature in (aligned, theirs)]
        for head in (teacher.classes, teacher.boxes)
    ]
    quality = rows[0][1].amax(1).sigmoid()
    expected = KF.crosskd_class_loss(*rows[0], avg_factor=quality.sum())
    torch.testing.assert_close(found["class"], expected)
    torch.testing.assert_close(found["box"], 4 * KF.crosskd_box_loss(*rows[1], quality, 2.0))
    (found["class"] + found["box"]).backward()
    assert ours.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_small_sums_of_the_quality_do_not_enlarge_the_loss() -> None:
    """The class loss is divided by the sum of the teacher's scores, but at least by 1."""
    teacher, ours, theirs = _Detector().double().eval(), draw(2, 5, 4, 3), draw(2, 5, 4, 3, seed=1)
    teacher.classes[-1].bias.data.fill_(-9.0)
    given = outputs(a=ours), outputs(c=theirs)
    found = built(CrossKD(["a"], ["c"], "classes"), *given, (nn.Identity(), teacher))(*given, BATCH)
    rows = [
        teacher.classes(feature).movedim(1, 3).flatten(0, 2) for feature in (KF.crosskd_aligned(ours, theirs), theirs)
    ]
    assert rows[1].amax(1).sigmoid().sum() < 1
    torch.testing.assert_close(found["class"], KF.crosskd_class_loss(*rows, avg_factor=torch.tensor(1.0).double()))


def test_crosskd_aligns_means_and_deviations() -> None:
    student, teacher = 5 * draw(3, 4, 2, 6) - 2, draw(3, 4, 5, 5, seed=1)
    found = torch.std_mean(KF.crosskd_aligned(student, teacher), dim=(0, 2, 3))
    torch.testing.assert_close(found, torch.std_mean(teacher, dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_head": "class"}, "_Detector has no layer 'class'; set teacher_head of CrossKD"),
        ({"teacher_head": "classes.3"}, r"applies the teacher's layer 'classes.3' to features \(2, 5, 4, 4\), which"),
        ({"teacher_head": "tokens"}, "requires a teacher layer that returns a map .* but 'tokens' does not"),
        (
            {"teacher_head": "classes", "teacher_box_head": "three"},
            r"CrossKD compares distributions of boxes, 4 \* \(reg_max \+ 1\) channels .*, got 3 and 3; use the",
        ),
    ],
)
def test_invalid_heads(settings: dict[str, str], message: str) -> None:
    student, teacher = outputs(a=torch.rand(2, 5, 4, 4)), outputs(c=torch.rand(2, 5, 4, 4))
    with pytest.raises(ValueError, match=message):
        CrossKD(["a"], ["c"], **settings).build(Probe(nn.Identity(), student), Probe(_Detector(), teacher))


def test_invalid_layers() -> None:
    student, teacher = outputs(a=draw(2, 8, 4, 4)), outputs(p=draw(2, 6))
    with pytest.raises(ValueError, match=r"CrossKD reads feature maps .*, but the teacher layer returns \(2, 6\)"):
        built(CrossKD(["a"], ["p"]), student, teacher)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"beta": 0.5}, ValueError, "beta must be at least 1, got 0.5"),
        (
            {"student_box_layers": ["b"], "teacher_box_layers": ["d"]},
            ValueError,
            "CrossKD requires a teacher_box_head and as many student_box_layers as student_layers, got None, 1 and 1",
        ),
        ({"student_box_layers": "b"}, TypeError, r"student_box_layers must be a list .*, got 'b'; use \['b'"),
    ],
)
def test_invalid_settings(settings, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CrossKD(**settings)
