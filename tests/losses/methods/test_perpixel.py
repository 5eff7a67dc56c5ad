"""PerPixel: criteria of logits, applied to each pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd import Batch, Outputs
from lkd.losses import DIST, KD, PerPixel
from lkd.types import IGNORE_INDEX
from tests.losses.cases import SegmentationCase
from tests.losses.parity import Hyper, Values

CASES = {
    "PerPixel": SegmentationCase(
        lambda: PerPixel(KD(2.0)),
        teacher_logits=(6, 4),
        mask=(7, 8),
        zero_at_equality=True,
        batch_mean=True,
        reads_target=True,
    ),
    "PerPixel-pairs": SegmentationCase(
        lambda: PerPixel(DIST(), max_pixels=40), mask=(7, 8), zero_at_equality=True, reads_target=True
    ),
}


def _terms(criterion: PerPixel, inputs: Values, target: Tensor) -> Values:
    student, teacher = (Outputs(inputs[name], {}) for name in ("student", "teacher"))
    return criterion(student, teacher, Batch(None, target))


def _pixel_kd(inputs: Values, hyper: Hyper) -> Values:
    """The reference implementations, except for one, include ignored pixels; they differ in scale."""
    criterion, target = PerPixel(KD(hyper["temperature"])), inputs["target"].long()
    labelled = target.masked_fill(target == hyper["ignore_index"], IGNORE_INDEX)
    (every,) = _terms(criterion, inputs, torch.zeros_like(target)).values()
    (kept,) = _terms(criterion, inputs, labelled).values()
    classes, height, width = inputs["student"].shape[1:]
    same = dict.fromkeys(("loss", "loss.dist_kd"), every)
    scaled = {"loss.ifvd": every / (classes * hyper["temperature"] ** 2), "loss.mmrazor": every * height * width}
    return {**same, **scaled, "loss.ignore": kept}


def _dist(inputs: Values, hyper: Hyper) -> Values:
    target = torch.zeros_like(inputs["student"][:, 0]).long()
    inter, intra = (_terms(PerPixel(DIST(*weights)), inputs, target) for weights in ((1.0, 0.0), (0.0, 1.0)))
    both = _terms(PerPixel(DIST(hyper["beta"], hyper["gamma"])), inputs, target)
    return {"inter": inter["inter"], "intra": intra["intra"], "loss": both["inter"] + both["intra"]}


PARITY = {"pixel_kd": _pixel_kd, "dist_dense": _dist}
