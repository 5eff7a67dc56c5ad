"""BYOT: be your own teacher, by self-distillation."""

from __future__ import annotations

from lkd.losses import BYOT
from tests.losses.cases import FeatureCase

CASES = {
    "BYOT": FeatureCase(
        lambda: BYOT(["a", "b", "c"]),
        student={"a": (4, 8, 8), "b": (6, 4, 4), "c": (8, 2, 2)},
        batch_mean=True,
        reads_target=True,
    ),
}
