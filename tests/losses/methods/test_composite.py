"""Sums of criteria."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import KD, MLKD, SSKD, WeightedSum
from tests.losses.cases import LogitCase

CASES = {"WeightedSum": LogitCase(lambda: WeightedSum({"soft": KD(), "sharp": KD(1.0)}, {"soft": 0.3}))}


def test_weighted_sum(logits) -> None:
    student, teacher = logits
    criterion = WeightedSum({"soft": KD(2.0), "sharp": KD(1.0)}, weights={"soft": 0.25})
    terms = criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, torch.zeros(8)))
    torch.testing.assert_close(terms["soft"], 0.25 * KF.kd_loss(student, teacher, 2.0))
    torch.testing.assert_close(terms["sharp"], KF.kd_loss(student, teacher, 1.0))


@pytest.mark.parametrize(
    ("criteria", "weights", "message"),
    [
        ({}, None, "at least one criterion"),
        ({"kd": KD()}, {"kd": -1.0}, r"must not be negative, got \{'kd': -1.0\}"),
        ({"kd": KD()}, {"dk": 1.0}, r"weights for \['dk'\], but its criteria are \['kd'\]"),
        ({"kd": KD()}, {"kd": float("nan")}, r"must not be negative, got \{'kd': nan\}; use finite"),
        ({"kd": KD()}, {"kd": float("inf")}, r"must not be negative, got \{'kd': inf\}; use finite"),
        ({"hard": KD()}, None, r"must not be named \['hard'\]"),
        (
            {"items": KD(), "kd.a": KD(), "": KD(), 1: KD()},
            None,
            r"be named \['items', 'kd.a', '', 1\]: a name",
        ),
        (
            {"kd": MLKD(), "sskd": SSKD()},
            None,
            r"WeightedSum read 2 and 4 views of each image, but all images of a batch",
        ),
    ],
)
def test_invalid_settings(criteria, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedSum(criteria, weights)


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ([KD()], "WeightedSum requires a dict of names and criteria, got list"),
        ({"kd": KD}, r"WeightedSum requires .* got the class KD; create an instance: KD\(\)"),
    ],
)
def test_invalid_criteria(criteria, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        WeightedSum(criteria)
