"""AT: attention transfer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss, normalize

from lkd.functional import at_loss
from lkd.losses import AT
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

CASES = {
    "AT": FeatureCase(
        lambda: AT(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "AT-sizes": FeatureCase(
        lambda: AT(["a"], ["c"], p=1.0), student={"a": (4, 8, 8)}, teacher={"c": (6, 4, 4)}, batch_mean=True
    ),
}


def _at_dense(inputs: Values, hyper: Hyper) -> Values:
    named = parity.named(inputs)
    loss = parity.terms(parity.built(AT(*parity.layers(named)), named), named)["loss"]
    return {"loss": loss, "loss.mmrazor": loss}


def _at(inputs: Values, hyper: Hyper) -> Values:
    loss = parity.terms(parity.built(AT(*parity.layers(inputs), p=hyper["p"]), inputs), inputs)["loss"]
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss}


PARITY = {"at": _at, "at_dense": _at_dense}


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_gradient_of_inactive_neurons(p: float) -> None:
    """With an exponent below 1, the derivative of the power is infinite at 0."""
    student, teacher = (
        tensor.relu() for tensor in torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    student.requires_grad_()
    loss = at_loss(student, teacher, p)
    loss.backward()
    maps = [normalize((tensor**p).mean(1).flatten(1), dim=1) for tensor in (student, teacher)]
    torch.testing.assert_close(loss, mse_loss(*maps))
    assert student.grad.isfinite().all()
    assert student.grad[student > 0].abs().max() > 0
    assert at_loss(student, teacher.index_fill(1, torch.tensor(0), torch.nan), p).isnan()


def test_invalid_layers() -> None:
    form = draw(4, 6)
    with pytest.raises(ValueError, match=r"AT reads .*, but the student layer returns .*; use another"):
        built(AT(["a"], ["c"]), *output_pair(form, form))
