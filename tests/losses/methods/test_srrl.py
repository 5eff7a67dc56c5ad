"""SRRL: softmax regression representation learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd import Batch
from lkd import functional as KF
from lkd.losses import SRRL
from tests.losses import parity
from tests.losses.cases import CLASSES, FeatureCase, classifier
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes

MAPS = {"student": {"a": (4, 8, 8)}, "teacher": {"c": (6, 4, 4)}}

IMAGES = 6

CASES = {
    "SRRL": FeatureCase(lambda: SRRL("a", "c"), **MAPS, teacher_network=classifier(6), batch_mean=True),
}


def _srrl(inputs: Values, hyper: Hyper) -> Values:
    (ours,), (theirs,) = parity.layers(inputs)
    given = parity.parameters(inputs, Connectors="connector")

    def found(weight: float) -> Values:
        criterion = SRRL(ours, theirs, regression_weight=weight)
        return parity.terms(parity.built(criterion, inputs, teacher=parity.classifier(inputs)), inputs, **given)

    plain = found(1.0)
    return {
        "fm": plain["fm"],
        "sr": plain["sr"],
        "loss": found(hyper["weight"])["loss"],
        "loss.clskd_alpha1_beta5": found(5.0)["loss"],
    }


PARITY = {"srrl": _srrl}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_srrl_applies_the_teachers_classifier(heads, maps) -> None:
    criterion = built(SRRL("a", "c"), *maps, heads)
    terms = criterion(*maps, _batch())
    connected = criterion.connector(maps[0].features["a"]).mean((2, 3))
    torch.testing.assert_close(terms["fm"], F.mse_loss(connected, maps[1].features["c"].mean((2, 3))))
    torch.testing.assert_close(terms["sr"], F.mse_loss(heads[1](connected), maps[1].logits))
    weight, bias = heads[1][0].weight, heads[1][0].bias
    connected = criterion.connector(maps[0].features["a"])
    loss = KF.srrl_loss(connected, maps[1].features["c"], maps[1].logits, weight, bias, 3.0)
    torch.testing.assert_close(loss, terms["fm"] + 3 * terms["sr"])
    loss.backward()
    assert weight.grad is None


def test_classifiers_are_not_saved_with_the_criterion(distill) -> None:
    module = distill(criterion=SRRL())
    module.build(torch.zeros(1, 3, 8, 8))
    assert not [name for name in module.criterion.state_dict() if "head" in name]
    assert not [name for name in module.state_dict() if name.startswith("teacher")]


def test_invalid_layers() -> None:
    with pytest.raises(ValueError, match="the layer 'fc' does not exist; set another feature map"):
        built_on_shapes(SRRL("a", "b", teacher_head="fc"), (2, 4, 4, 4), (2, 4, 4, 4))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="regression_weight must not be negative"):
        SRRL(regression_weight=-1)
