"""PKT: probabilistic knowledge transfer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lkd import functional as KF
from lkd.losses import PKT
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values

SAME = {"student": {"a": (6,)}, "teacher": {"c": (6,)}}

VECTORS = {"student": {"a": (6,)}, "teacher": {"c": (9,)}}

CASES = {
    "PKT": FeatureCase(lambda: PKT(["a"], ["c"]), **SAME, zero_at_equality=True),
    "PKT-sizes": FeatureCase(lambda: PKT(["a"], ["c"]), **VECTORS),
}


def _pkt(inputs: Values, hyper: Hyper) -> Values:
    loss = parity.terms(PKT(*parity.layers(inputs), hyper["eps"]), inputs)["loss"]
    same = {f"loss.{peer}": loss for peer in ("repdistiller", "torchdistill")}
    return {"loss": loss, **same, "weighted": hyper["feat_weight"] * loss}


PARITY = {"pkt": _pkt}


def test_pkt_by_a_loop(vectors) -> None:
    student, teacher = (_neighbours(rows.tolist()) for rows in vectors)
    expected = sum(
        q * math.log((q + 1e-7) / (p + 1e-7))
        for ours, theirs in zip(student, teacher, strict=True)
        for p, q in zip(ours, theirs, strict=True)
    )
    assert KF.pkt_loss(*vectors).item() == pytest.approx(expected / 36, rel=1e-6)


def _neighbours(rows: list[list[float]]) -> list[list[float]]:
    kernel = [[(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) + 1) / 2 for y in rows] for x in rows]
    return [[value / sum(row) for value in row] for row in kernel]
