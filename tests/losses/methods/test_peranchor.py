"""PerAnchor: criteria of logits, applied to the anchors of detectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import Batch, Outputs, Predictions, Probe
from lkd.losses import KD, NKD, PKD, LogitMSE, PerAnchor
from tests.losses.cases import FeatureCase

BATCH = Batch(None, torch.zeros(2, dtype=torch.int64))


def _outputs(class_logits: Tensor | None) -> Outputs:
    return Outputs(Predictions(None, 5, (), class_logits, {}), {})  # type: ignore[arg-type]


class _FromLayers(PerAnchor):
    """PerAnchor that reads the class logits from features, so that the tests of all criteria can change them."""

    reads_logits = False  # type: ignore[assignment]

    def resolve_layers(self, student, teacher) -> None:
        pass

    def build(self, student: Probe, teacher: Probe) -> None:
        self.student_layers, self.teacher_layers = ("a",), ("c",)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return super().forward(_outputs(student.features["a"]), _outputs(teacher.features["c"]), batch)


CASES = {
    "PerAnchor": FeatureCase(
        lambda: _FromLayers(KD(2.0), max_anchors=3),
        student={"a": (6, 5)},
        teacher={"c": (6, 5)},
        zero_at_equality=True,
        batch_mean=True,
    )
}


def test_the_teachers_best_anchors_are_distilled() -> None:
    student, teacher = 3 * torch.randn(2, 2, 40, 5, generator=torch.Generator().manual_seed(0))
    teacher[:, ::2, 0] += 20  # certainly background
    for criterion, loss in (
        (KD(2.0), lambda own, other: 4 * F.kl_div((own / 2).log_softmax(0), (other / 2).softmax(0), reduction="sum")),
        (LogitMSE(), F.mse_loss),
    ):
        (found,) = PerAnchor(criterion, max_anchors=3)(_outputs(student), _outputs(teacher), BATCH).values()
        expected = []
        for own, other in zip(student, teacher, strict=True):
            best = sorted(range(len(other)), key=lambda anchor: -float(other[anchor, 1:].max()))[:3]
            expected += [loss(own[anchor], other[anchor]) for anchor in best]
        torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize(
    ("criterion", "max_anchors", "message"),
    [(PKD(), 8, "reads features"), (NKD(), 8, "cannot apply NKD"), (KD(), 0, "max_anchors must be at least 1, got 0")],
)
def test_invalid_settings(criterion, max_anchors: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerAnchor(criterion, max_anchors)


def test_invalid_outputs() -> None:
    anchors = torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"the same anchors and classes .* \(2, 4, 5\) and \(2, 3, 5\)"):
        PerAnchor(KD())(_outputs(anchors), _outputs(anchors[:, :3]), BATCH)
    for wrong in (_outputs(None), Outputs(torch.zeros(2, 5), {})):
        with pytest.raises(ValueError, match="which the teacher does not return; use a detector with one stage"):
            PerAnchor(KD())(_outputs(anchors), wrong, BATCH)
