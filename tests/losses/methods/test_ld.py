"""LD: localization distillation."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch
from lkd import functional as KF
from lkd.losses import LD
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, outputs

BATCH = Batch(None, torch.zeros(2, dtype=torch.int64))

CASES = {
    "LD": FeatureCase(
        lambda: LD(["a", "b"], ["c", "d"], ["p", "q"]),
        student={"a": (4 * 3, 8, 8), "b": (4 * 5, 4, 4), "p": (3, 8, 8), "q": (3, 4, 4)},
        teacher={"c": (4 * 3, 8, 8), "d": (4 * 5, 4, 4)},
        batch_mean=True,
    ),
    "LD-sizes": FeatureCase(
        lambda: LD(["a"], ["c"], ["p"], temperature=1.0, avg_factor=16.0),
        student={"a": (4 * 3, 4, 8), "p": (3, 2, 2)},
        teacher={"c": (4 * 3, 8, 6)},
        batch_mean=True,
    ),
}


def _ld(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains rows and the weights themselves. CrossKD sums over the bins and adds eps to the divisor."""
    named = {
        "student_features.0": inputs["student"].T[None, :, :, None],
        "student_features.1": inputs["weight"].logit()[None, None, :, None],
        "teacher_features.0": inputs["teacher"].T[None, :, :, None],
    }
    criterion = LD(["a"], ["c"], ["b"], temperature=hyper["temperature"], avg_factor=hyper["avg_factor"])
    loss = parity.terms(parity.built(criterion, named), named)["loss"]
    factor = (hyper["reg_max"] + 1) * hyper["avg_factor"] / (hyper["avg_factor"] + torch.finfo(torch.float32).eps)
    return {"loss": loss, "weighted": hyper["weight"] * loss, "loss.crosskd_sum": factor * loss}


PARITY = {"ld": _ld}


def test_ld_by_a_loop() -> None:
    """The weight of a position is the student's largest class probability, computed from the logits."""
    student, teacher, scores = (draw(2, channels, 3, 2, seed=channels) for channels in (12, 12, 5))
    teacher = teacher.flip(0) * 2
    expected = 0.0
    for image in range(2):
        for row in range(3):
            for column in range(2):
                ours, theirs = (values[image, :, row, column].view(4, 3) / 2 for values in (student, teacher))
                weight = scores[image, :, row, column].max().sigmoid()
                difference = theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))
                expected += float(weight * 4 * difference.sum() / 3 / 4 / 2)
    given = outputs(scores, a=student), outputs(c=teacher)
    found = built(LD(["a"], ["c"], temperature=2.0), *given)(*given, BATCH)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (LD(), "the criterion reads features, but no layers are set"),
        (LD(["a"], ["c"], ["a", "b"]), "LD requires as many student_layers as teacher_layers, .* got 1 teacher_layers"),
        (LD(["a"], ["c"]), r"LD reads feature maps .*, but the class_score layer returns \(2, 5\)"),
        (LD(["a"], ["d"], ["b"]), r"LD compares distributions of boxes, .*, got 8 and 12; use the layers that"),
        (LD(["e"], ["e"], ["b"]), r"LD compares distributions of boxes, .*, got 4 and 4; use the layers that"),
    ],
)
def test_invalid_layers(criterion: LD, message: str) -> None:
    student = outputs(a=draw(2, 8, 4, 4), b=draw(2, 3, 4, 4), e=draw(2, 4, 4, 4))
    teacher = outputs(c=draw(2, 8, 4, 4), d=draw(2, 12, 4, 4), e=draw(2, 4, 4, 4), p=draw(2, 6))
    with pytest.raises(ValueError, match=message):
        built(criterion, student, teacher)


def test_class_layers_must_be_a_list() -> None:
    with pytest.raises(TypeError, match=r"class_layers must be a list of layer names, got 'b'; use \['b'\]"):
        LD(["a"], ["c"], "b")


def test_box_layers_require_four_sides() -> None:
    with pytest.raises(ValueError, match=r"ld_loss expects student_boxes of shape \(N, 4 \* M\), got \(3, 6\)"):
        KF.ld_loss(torch.ones(3, 6), torch.ones(3, 6), torch.ones(3))
