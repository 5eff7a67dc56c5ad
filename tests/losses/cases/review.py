"""Knowledge review."""

from lkd.losses import ReviewKD
from tests.losses.cases.base import FeatureCase

CASES = {
    "ReviewKD": FeatureCase(
        lambda: ReviewKD(["a", "b", "p"], ["c", "d", "q"]),
        student={"a": (4, 8, 8), "b": (6, 4, 4), "p": (6,)},
        teacher={"c": (5, 8, 8), "d": (7, 4, 4), "q": (7,)},
        batch_mean=True,
        min_samples=2,
    ),
    "ReviewKD-sizes": FeatureCase(
        lambda: ReviewKD(["a", "b"], ["c", "d"], max_mid_channels=3),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 6, 4), "d": (7, 3, 5)},
        batch_mean=True,
    ),
}
