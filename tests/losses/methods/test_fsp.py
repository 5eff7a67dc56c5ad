"""FSP: flow of solution procedure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lkd import functional as KF
from lkd.losses import FSP
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built_stages, stages

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 4)}

EQUAL = {"c": (4, 8, 8), "d": (6, 4, 4)}

OTHER = {"c": (5, 4, 4), "d": (7, 8, 6)}

CASES = {
    "FSP": FeatureCase(lambda: FSP(*LAYERS), student=STUDENT, teacher=EQUAL, zero_at_equality=True, batch_mean=True),
    "FSP-mean": FeatureCase(
        lambda: FSP(*LAYERS, pooling="mean", reduction="mean", connect=True),
        student=STUDENT,
        teacher=OTHER,
        batch_mean=True,
    ),
}


def _fsp(inputs: Values, hyper: Hyper) -> Values:
    """Unlike lkd, torchdistill sums the norms of the columns of the matrices' difference."""
    ours, theirs = ([inputs[layer] for layer in names] for names in parity.layers(inputs))
    differences = [
        KF.fsp_matrix(*student) - KF.fsp_matrix(*teacher)
        for student, teacher in zip(pairwise(ours), pairwise(theirs), strict=True)
    ]
    columns = torch.stack([difference.norm(dim=1).sum(1).mean() for difference in differences]).sum()
    benchmark = parity.built(FSP(*parity.layers(inputs), pooling="mean", reduction="mean"), inputs)
    return {"loss.repdistiller": parity.terms(benchmark, inputs)["loss"], "loss.torchdistill": columns}


PARITY = {"fsp": _fsp}


def test_fsp_is_a_frobenius_norm() -> None:
    shapes = ((2, 8, 8), (3, 4, 4), (4, 4, 4))
    ours, theirs = stages(0, shapes), stages(1, shapes)
    total = 0.0
    for layer in range(2):
        for sample in range(3):
            matrices = []
            for features in (ours, theirs):
                bottom, top = features[layer][sample].numpy(), features[layer + 1][sample].numpy()
                if bottom.shape[1] == 8:
                    bottom = bottom.reshape(len(bottom), 4, 2, 4, 2).max((2, 4))
                matrices.append(np.einsum("ihw,jhw->ij", bottom, top) / 16)
            total += np.linalg.norm(matrices[0] - matrices[1]) ** 2 / 3
    assert float(KF.fsp_loss(ours, theirs)) == pytest.approx(total, rel=1e-12)


def test_different_channels_require_connect() -> None:
    ours, theirs = stages(0), stages(1, ((6, 5, 5), (9, 4, 4), (7, 3, 3)))
    with pytest.raises(ValueError, match=r"FSP requires the same number of channels .* got 8 \(layer1\) and 9"):
        built_stages(FSP, ours, theirs)
    criterion = built_stages(FSP, ours, theirs, connect=True)
    assert {name.partition(".")[2].partition(".")[0] for name, _ in criterion.named_parameters()} == {"1"}
    with pytest.raises(ValueError, match="requires at least two, got 1"):
        built_stages(FSP, ours[:1], ours[:1])
