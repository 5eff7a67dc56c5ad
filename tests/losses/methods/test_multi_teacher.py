"""MultiTeacher: confidence-aware multi-teacher knowledge distillation."""

from __future__ import annotations

from typing import Any

from torch import nn

from lkd.losses import AT, KD, FitNet, MultiTeacher
from tests.losses.cases import CLASSES, FeatureCase

LOGITS = {f"members.{number}": (CLASSES,) for number in range(2)}


class _Teachers(nn.Module):
    """Two networks without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.Identity(), nn.Identity()])


def _several(criterion: Any, **settings: Any) -> MultiTeacher:
    several = MultiTeacher(criterion, **settings)
    several.resolve_layers(nn.Identity(), _Teachers())
    return several


MAPS = {"members.0": (CLASSES,), "members.0.c": (6, 4, 4), "members.1": (CLASSES,), "members.1.c": (6, 4, 4)}

CASES = {
    "MultiTeacher": FeatureCase(
        lambda: _several(KD(), weights=[3.0, 1.0]), teacher=LOGITS, teacher_network=_Teachers, batch_mean=True
    ),
    "MultiTeacher-FitNet": FeatureCase(
        lambda: _several(FitNet(["a"], ["c"])),
        student={"a": (4, 8, 8)},
        teacher=MAPS,
        teacher_network=_Teachers,
        batch_mean=True,
    ),
    "MultiTeacher-confidence": FeatureCase(
        lambda: _several(KD(), weighting="confidence"),
        teacher=LOGITS,
        teacher_network=_Teachers,
        batch_mean=True,
        reads_target=True,
    ),
    "MultiTeacher-confidence-AT": FeatureCase(
        lambda: _several(AT(["a"], ["c"]), weighting="confidence"),
        student={"a": (4, 8, 8)},
        teacher=MAPS,
        teacher_network=_Teachers,
        batch_mean=True,
        reads_target=True,
    ),
    "MultiTeacher-learned": FeatureCase(
        lambda: _several(KD(), weighting="learned"),
        teacher=LOGITS,
        teacher_network=_Teachers,
        batch_mean=True,
        reads_target=True,
    ),
}
