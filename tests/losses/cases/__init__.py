"""The table of criteria that read features, or need more than one batch of logits: a file for each family."""

from tests.losses.cases import feature, loops
from tests.losses.cases.base import FeatureCase

CASES: dict[str, FeatureCase] = {**feature.CASES, **loops.CASES}
