"""Criteria of knowledge adaptation."""

from lkd.losses import KTA
from tests.losses.cases.base import FeatureCase

CASES = {
    "KTA": FeatureCase(
        lambda: KTA(["a", "b"], ["c", "d"]),
        student={"a": (4, 4, 4), "b": (6, 8, 8)},
        teacher={"c": (4, 4, 4), "d": (5, 4, 4)},
        batch_mean=True,
    ),
    "KTA-p2": FeatureCase(
        lambda: KTA(["a"], ["c"], p=2.0), student={"a": (4, 4, 4)}, teacher={"c": (5, 8, 8)}, batch_mean=True
    ),
}
