"""The table of criteria that read features, or need more than one batch of logits: a file for each family."""

from tests.losses.cases import adaptation, feature, masked, regression, relation
from tests.losses.cases.base import FeatureCase

CASES: dict[str, FeatureCase] = {
    **adaptation.CASES,
    **feature.CASES,
    **masked.CASES,
    **regression.CASES,
    **relation.CASES,
}
