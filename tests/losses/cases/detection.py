"""Criteria of detectors' features and heads."""

from lkd.losses import PKD
from tests.losses.cases.base import FeatureCase

LAYERS = (["a", "b"], ["c", "d"])

CASES = {
    "PKD": FeatureCase(
        lambda: PKD(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
    ),
    "PKD-sizes": FeatureCase(
        lambda: PKD(*LAYERS, resize_student=False),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 8), "d": (6, 8, 6)},
    ),
}
