"""IFVD: intra-class feature variation distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import Batch, Outputs
from lkd.losses import IFVD, DistillLoss
from lkd.types import IGNORE_INDEX
from tests.losses import parity
from tests.losses.cases import LAYERS, SegmentationCase
from tests.losses.parity import Hyper, Values

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 6)}

EQUAL = {"c": (4, 8, 8), "d": (6, 4, 6)}

OTHER = {"c": (5, 8, 4), "d": (7, 6, 8)}

CASES = {
    "IFVD": SegmentationCase(
        lambda: IFVD(*LAYERS),
        student=STUDENT,
        teacher=EQUAL,
        zero_at_equality=True,
        batch_mean=True,
        reads_target=True,
    ),
    "IFVD-sizes": SegmentationCase(
        lambda: IFVD(*LAYERS), student=STUDENT, teacher=OTHER, batch_mean=True, reads_target=True
    ),
}


def _ifvd(inputs: Values, hyper: Hyper) -> Values:
    """The criterion reads the number of classes from the logits, which are missing in the fixture."""
    classes = int(hyper["classes"])
    logits = inputs["student"].new_zeros(1, classes, 1, 1)
    given = {**inputs, "student_logits": logits, "target": parity.masks(inputs, classes)}
    loss = parity.layer_terms(IFVD(["student"], ["teacher"]), given)["loss"]
    return dict.fromkeys(("loss", "loss.cirkd", "loss.cwd_repo"), loss)


PARITY = {"ifvd": _ifvd}


def _features(feature: Tensor, classes: int = 3) -> Outputs:
    return Outputs(torch.zeros(len(feature), classes, 2, 2), {"a": feature})


def _value(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    loss = criterion(_features(student), _features(teacher), Batch(None, target))
    assert isinstance(loss, Tensor)
    return loss


def test_ifvd_of_unlabelled_pixels_is_zero() -> None:
    student, teacher = torch.randn(2, 2, 4, 6, 6)
    target = torch.randint(3, (2, 6, 6)).index_fill(1, torch.tensor([1, 4]), IGNORE_INDEX)
    criterion = IFVD(["a"], ["a"])
    found = _value(criterion, student, teacher, target)
    assert torch.equal(found, _value(criterion, student.index_fill(2, torch.tensor([1, 4]), 9.0), teacher, target))
    rows = torch.tensor([0, 2, 3, 5])
    parts = (values.index_select(2, rows) for values in (student, teacher))
    torch.testing.assert_close(found, _value(criterion, *parts, target.index_select(1, rows)) * 4 / 6)


def test_ifvd_by_a_loop() -> None:
    """Masks are resized to the feature maps, and the centers are computed for each image separately."""
    student, teacher, target = torch.randn(2, 3, 3, 3), torch.randn(2, 5, 3, 3), torch.randint(3, (2, 6, 9))
    small = target[:, ::2, ::3]

    def similarities(feature: Tensor) -> Tensor:
        found = torch.zeros(2, 3, 3)
        for image in range(2):
            for number in small[image].unique().tolist():
                pixels = feature[image][:, small[image] == number]
                center = pixels.mean(1, keepdim=True)
                found[image][small[image] == number] = F.cosine_similarity(pixels, center, dim=0)
        return found

    expected = (similarities(student) - similarities(teacher)).square().mean()
    torch.testing.assert_close(_value(IFVD(["a"], ["a"]), student, teacher, target), expected)
