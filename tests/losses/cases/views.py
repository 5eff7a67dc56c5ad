"""Criteria that read several views of each image."""

from lkd.losses import CSKD, MLKD, SSKD, LogitStandardization
from tests.losses.cases.base import FeatureCase

CASES = {
    "CSKD": FeatureCase(CSKD, views=2, batch_mean=True, reads_target=True),
    "MLKD": FeatureCase(MLKD, views=2, zero_at_equality=True),
    "MLKD-paper": FeatureCase(lambda: MLKD("paper", (4.0, 2.0), percentile=80.0), views=2, zero_at_equality=True),
    "LogitStandardization-MLKD": FeatureCase(lambda: LogitStandardization(MLKD()), views=2, zero_at_equality=True),
    "SSKD": FeatureCase(lambda: SSKD("a", "b"), student={"a": (6,)}, teacher={"b": (9,)}, views=4, reads_target=True),
}
