"""Criteria that regenerate a masked feature."""

from lkd.losses import MGD
from tests.losses.cases.base import FeatureCase

CASES = {
    "MGD": FeatureCase(
        lambda: MGD(["a", "b"], ["c", "d"], mask_ratio=0.5),
        student={"a": (4, 4, 4), "b": (6, 8, 8)},
        teacher={"c": (4, 4, 4), "d": (5, 4, 4)},
    ),
    "MGD-pixels": FeatureCase(
        lambda: MGD(["a", "b"], ["c", "d"], mask_ratio=0.5, mask="pixels"),
        student={"a": (4, 4, 4), "b": (6, 8, 8)},
        teacher={"c": (4, 4, 4), "d": (5, 4, 4)},
    ),
    "MGD-unmasked": FeatureCase(
        lambda: MGD(["a"], ["c"], mask_ratio=0.0), student={"a": (4, 4, 4)}, teacher={"c": (5, 8, 8)}, batch_mean=True
    ),
}
