"""SP: similarity-preserving knowledge distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lkd import functional as KF
from lkd.losses import SP
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values

MAPS = {"student": {"a": (4, 8, 8), "b": (6, 4, 4)}, "teacher": {"c": (4, 8, 8), "d": (6, 4, 4)}}

VECTORS = {"student": {"a": (6,)}, "teacher": {"c": (9,)}}

CASES = {
    "SP": FeatureCase(lambda: SP(["a", "b"], ["c", "d"]), **MAPS, zero_at_equality=True),
    "SP-sizes": FeatureCase(lambda: SP(["a"], ["c"]), **VECTORS),
}


def _sp(inputs: Values, hyper: Hyper) -> Values:
    loss = parity.terms(SP(*parity.layers(inputs)), inputs)["loss"]
    return {"loss": loss, "loss.repdistiller": loss, "weighted": hyper["feat_weight"] * loss}


PARITY = {"sp": _sp}


def test_sp_by_a_loop(vectors) -> None:
    grams = []
    for rows in vectors:
        gram = (rows @ rows.T).numpy()
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = ((grams[0] - grams[1]) ** 2).sum() / 36
    assert KF.sp_loss(*vectors).item() == pytest.approx(expected, rel=1e-12)


def test_sp_flattens_maps() -> None:
    maps = [torch.randn(4, channels, 3, 3) for channels in (2, 5)]
    torch.testing.assert_close(KF.sp_loss(*maps), KF.sp_loss(*(feature.flatten(1) for feature in maps)))
