"""The table of criteria that read features, or need more than one batch of logits: a file for each family."""

from tests.losses.cases import (
    adaptation,
    boundary,
    detection,
    feature,
    flow,
    head,
    loops,
    masked,
    regression,
    relation,
    review,
    segmentation,
    views,
)
from tests.losses.cases.base import FeatureCase

CASES: dict[str, FeatureCase] = {
    **adaptation.CASES,
    **boundary.CASES,
    **detection.CASES,
    **feature.CASES,
    **flow.CASES,
    **head.CASES,
    **loops.CASES,
    **masked.CASES,
    **regression.CASES,
    **relation.CASES,
    **review.CASES,
    **segmentation.CASES,
    **views.CASES,
}
