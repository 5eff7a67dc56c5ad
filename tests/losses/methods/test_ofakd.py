"""OFAKD: one-for-all knowledge distillation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lkd import Batch
from lkd import functional as KF
from lkd.losses import OFAKD
from lkd.types import IGNORE_INDEX
from tests.losses import parity
from tests.losses.cases import CLASSES, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes, outputs

TOKENS = {"student": {"a": (10, 4), "b": (10, 4)}, "teacher": {"c": (10, 6), "d": (10, 6)}}

IMAGES = 6

CASES = {
    "OFAKD": FeatureCase(
        lambda: OFAKD(["a", "b"], eps=1.5, temperature=2.0),
        student={"a": (4, 8, 8), "b": (8, 4, 4)},
        batch_mean=True,
        reads_target=True,
    ),
    "OFAKD-tokens": FeatureCase(lambda: OFAKD(["a", "b"]), student=TOKENS["student"], batch_mean=True),
}


def _ofa(inputs: Values, hyper: Hyper) -> Values:
    """Compare only the loss of the student's own logits; lkd initializes the exits, so their loss weight is 0."""
    names = {"student": "student_logits", "teacher": "teacher_logits"}
    given = {names.get(name, name): tensor for name, tensor in inputs.items()}
    given["student_features.0"] = torch.ones(len(inputs["student"]), 4, 2, 2, dtype=torch.float64)
    criterion = parity.built(OFAKD(["layer"], hyper["eps"], hyper["temperature"], exits_weight=0.0), given)
    return parity.terms(criterion, given, **dict(criterion.named_parameters()))


PARITY = {"ofa": _ofa}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_ofa_by_a_loop() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(IMAGES, CLASSES), torch.randn(IMAGES, CLASSES)
    target = torch.tensor([0, 1, 2, 3, 4, IGNORE_INDEX])
    total = 0.0
    for i in range(IMAGES):
        p, q = ((logits[i] / 2).softmax(0).tolist() for logits in (teacher, student))
        for c in range(CLASSES):
            y = float(target[i] == c)
            total -= ((p[c] + y) ** 1.4 - y) * math.log(q[c])
    assert KF.ofa_loss(student, teacher, target, eps=1.4, temperature=2.0).item() == pytest.approx(total / IMAGES)
    plain = F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(KF.ofa_loss(student, teacher, target), plain)


def test_ofakd_has_one_exit_per_stage() -> None:
    features = {
        "a": torch.randn(IMAGES, 4, 8, 8),
        "b": torch.randn(IMAGES, 8, 4, 4),
        "c": torch.randn(IMAGES, 9, 12),
    }
    student, teacher = outputs(torch.randn(IMAGES, CLASSES), **features), outputs(torch.randn(IMAGES, CLASSES))
    criterion = built(OFAKD(list("abc"), exits_weight=0.5), student, teacher)
    exits = [out(feature) for out, feature in zip(criterion.exits, features.values(), strict=True)]
    assert all(logits.shape == (IMAGES, CLASSES) for logits in exits)
    terms = criterion(student, teacher, _batch())
    wanted = [KF.ofa_loss(logits, teacher.logits, _batch().target) for logits in (*exits, student.logits)]
    torch.testing.assert_close(terms["exits"], 0.5 * sum(wanted[:3]))
    torch.testing.assert_close(terms["logits"], wanted[3])


def test_invalid_layers() -> None:
    with pytest.raises(ValueError, match=r"OFAKD requires feature maps .* returns \(2, 4\); set other"):
        built_on_shapes(OFAKD(["a"]), (2, 4), (2, 4, 4, 4))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="eps must be greater than 0"):
        OFAKD(eps=0)
