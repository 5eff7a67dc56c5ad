"""VID: variational information distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd import Batch
from lkd.losses import VID
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

BATCH = Batch(None, torch.zeros(4, dtype=torch.int64))

CASES = {
    "VID": FeatureCase(
        lambda: VID(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 8, 8)},
        batch_mean=True,
    ),
}


def _vid(inputs: Values, hyper: Hyper) -> Values:
    criterion = parity.built(
        VID(*parity.layers(inputs), initial_variance=hyper["init_pred_var"], eps=hyper["eps"]), inputs
    )
    given = {f"regressors.0.{part}.weight": inputs[f"params.regressor.{part}.weight"] for part in (0, 2, 4)}
    return parity.terms(criterion, inputs, **given, **{"raw_variances.0": inputs["params.log_scale"]})


PARITY = {"vid": _vid}


def test_vid_variance_converges_to_the_error() -> None:
    """The variance that minimizes the loss is the channel's mean squared error."""
    student, teacher = output_pair(torch.zeros(64, 3, 4, 4).double(), 3 * draw(64, 2, 4, 4))
    criterion = built(VID(["a"], ["c"], initial_variance=2.0), student, teacher)
    raw = criterion.raw_variances[0]
    torch.testing.assert_close(F.softplus(raw) + 1e-5, torch.full((2,), 2.0, dtype=torch.float64))
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.3)
    for _ in range(600):
        optimizer.zero_grad()
        criterion(student, teacher, BATCH).backward()
        optimizer.step()
    errors = teacher.features["c"].square().mean((0, 2, 3))
    torch.testing.assert_close((F.softplus(raw) + 1e-5).detach(), errors, rtol=1e-3, atol=0)


def test_vid_variance_may_start_large() -> None:
    """The inverse of softplus must not be computed with exp alone, which overflows from 710 on."""
    criterion = built(VID(["a"], ["c"], initial_variance=1e4), *output_pair(draw(2, 3, 4, 4), draw(2, 2, 4, 4)))
    torch.testing.assert_close(F.softplus(criterion.raw_variances[0]) + 1e-5, torch.full((2,), 1e4).double())


def test_invalid_layers() -> None:
    form = draw(4, 6)
    with pytest.raises(ValueError, match=r"VID reads .*, but the student layer returns .*; use another"):
        built(VID(["a"], ["c"]), *output_pair(form, form))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match=r"VID requires 0 < eps < initial_variance < inf, got eps 1e-05 and .* 1e-06"):
        VID(initial_variance=1e-6)
