"""Criteria that compare feature maps pixel by pixel."""

from lkd.losses import AT, NST, FitNet
from tests.losses.cases.base import FeatureCase

LAYERS = (["a", "b"], ["c", "d"])

CASES = {
    "AT": FeatureCase(
        lambda: AT(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "AT-sizes": FeatureCase(
        lambda: AT(["a"], ["c"], p=1.0), student={"a": (4, 8, 8)}, teacher={"c": (6, 4, 4)}, batch_mean=True
    ),
    "FitNet": FeatureCase(
        lambda: FitNet(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 4, 4)},
        batch_mean=True,
    ),
    "FitNet-conv": FeatureCase(
        lambda: FitNet(*LAYERS, regressor="conv"),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 8, 6)},
        batch_mean=True,
    ),
    "NST": FeatureCase(
        lambda: NST(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "NST-sizes": FeatureCase(
        lambda: NST(["a"], ["c"]), student={"a": (20, 8, 8)}, teacher={"c": (6, 4, 4)}, batch_mean=True
    ),
}
