"""Logit criteria applied to the anchors of detectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses.base import DistillLoss, named_terms
from lkd.losses.composite import WrapperLoss
from lkd.types import IGNORE_INDEX, Batch, Outputs, Predictions, Probe


class PerAnchor(WrapperLoss):
    """Logit criterion applied to detectors, with each anchor as a sample.

    In each image, only the anchors with the teacher's highest class logits, without the background (class 0), are
    distilled, because most other anchors show only background. The labels of anchors are unknown, so the criterion must
    not read them. Student and teacher must have the same anchors, that is, heads on the same pyramid.

    Args:
        criterion: Logit criterion, such as `KD`, `LogitMSE` or `DIST`.
        max_anchors: Maximum number of anchors per image.

    Raises:
        ValueError: If the criterion reads features, labels, sample indices or several views, or `max_anchors` is less
            than 1. At the start of training, if a network is not a one-stage detector, or the anchors of the networks
            differ.

    References:
        Zheng et al.: Localization Distillation for Dense Object Detection, CVPR 2022 (arXiv 2102.12252), combine KD on
        class logits with LD, at the anchors that are assigned to objects or close to them.
    """

    def __init__(self, criterion: DistillLoss, max_anchors: int = 64) -> None:
        super().__init__(criterion)
        self.check_reads_logits()
        name = type(criterion).__name__
        if criterion.needs_index or criterion.num_views > 1 or criterion.skips_unlabelled is not False:
            raise ValueError(
                f"PerAnchor cannot apply {name}, which reads labels, sample indices or views; use another criterion"
            )
        if max_anchors < 1:
            raise ValueError(f"max_anchors must be at least 1, got {max_anchors}")
        self.max_anchors = max_anchors

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check that both networks have the same anchors, and build the criterion."""
        logits = zip((student, teacher), _anchors(student.outputs, teacher.outputs), strict=True)
        super().build(*(Probe(probe.network, Outputs(anchors.flatten(0, 1), {})) for probe, anchors in logits))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Apply the criterion to the anchors with the highest scores."""
        student_logits, teacher_logits = _anchors(student, teacher)
        scores = teacher_logits[..., 1:].amax(2)
        chosen = scores.topk(min(self.max_anchors, scores.shape[1]), sorted=False).indices.unsqueeze(2)
        student_rows, teacher_rows = (
            logits.take_along_dim(chosen, 1).flatten(0, 1) for logits in (student_logits, teacher_logits)
        )
        target = torch.full((len(student_rows),), IGNORE_INDEX, device=student_rows.device)
        return named_terms(
            "", self.criterion(Outputs(student_rows, {}), Outputs(teacher_rows, {}), Batch(None, target))
        )


def _anchors(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Return the class logits of all anchors of both networks `(B, N, K)`."""
    student_logits, teacher_logits = _class_logits("student", student), _class_logits("teacher", teacher)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"PerAnchor requires the same anchors and classes in student and teacher, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)} for (images, anchors, classes); use "
            "detectors of one kind, with the same pyramid"
        )
    return student_logits, teacher_logits


def _class_logits(name: str, outputs: Outputs) -> Tensor:
    logits: object = outputs.logits
    if not isinstance(logits, Predictions) or logits.class_logits is None:
        raise ValueError(
            f"PerAnchor reads the class logits of anchors, which the {name} does not return; use a detector with one "
            "stage (RetinaNet, FCOS, SSD) and lkd.tasks.Detection"
        )
    return logits.class_logits
