"""Criteria that regress the teacher's feature."""

from lkd.losses import PAD, SRD, VID
from tests.losses.cases.base import FeatureCase

LAYERS = (["a", "b"], ["c", "d"])

CASES = {
    "VID": FeatureCase(
        lambda: VID(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 8, 8)},
        batch_mean=True,
    ),
    "PAD": FeatureCase(
        lambda: PAD(*LAYERS),
        student={"a": (6,), "b": (8,)},
        teacher={"c": (6,), "d": (5,)},
        batch_mean=True,
        min_samples=2,
    ),
    "SRD": FeatureCase(
        lambda: SRD(*LAYERS), student={"a": (6,), "b": (8,)}, teacher={"c": (6,), "d": (5,)}, min_samples=2
    ),
    "SRD-exponent": FeatureCase(
        lambda: SRD(["a"], ["c"], exponent=1.0, temperature=2.0),
        student={"a": (6,)},
        teacher={"c": (8,)},
        min_samples=2,
    ),
}
