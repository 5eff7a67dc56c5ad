"""The table of criteria that read features, or need more than one batch of logits: a file for each family."""

from tests.losses.cases import adaptation, feature, head, masked, regression
from tests.losses.cases.base import FeatureCase

CASES: dict[str, FeatureCase] = {
    **feature.CASES,
    **regression.CASES,
    **masked.CASES,
    **adaptation.CASES,
    **head.CASES,
}
