"""FitNet: hints for thin deep nets."""

from __future__ import annotations

import pytest

from lkd.losses import FitNet
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

CASES = {
    "FitNet": FeatureCase(
        lambda: FitNet(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 4, 4)},
        batch_mean=True,
    ),
    "FitNet-conv": FeatureCase(
        lambda: FitNet(*LAYERS, regressor="conv"),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 8, 6)},
        batch_mean=True,
    ),
}


def _fitnet_dense(inputs: Values, hyper: Hyper) -> Values:
    named = parity.named(inputs)
    criterion = parity.built(FitNet(*parity.layers(named), regressor="conv"), named)
    return {"loss": parity.terms(criterion, named, **parity.parameters(inputs, conv="regressors.0"))["loss"]}


def _fitnet(inputs: Values, hyper: Hyper) -> Values:
    criterion = parity.built(FitNet(*parity.layers(inputs)), inputs)
    names = {"conv": "regressors.0.0", "bn": "regressors.0.1"}
    given = {f"{names[part]}.{kind}": inputs[f"params.{part}.{kind}"] for part in names for kind in ("weight", "bias")}
    loss = parity.terms(criterion, inputs, **given)["loss"]
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss}


PARITY = {"fitnet": _fitnet, "fitnet_dense": _fitnet_dense}


def test_invalid_layers() -> None:
    form = draw(4, 6)
    with pytest.raises(ValueError, match=r"FitNet reads .*, but the student layer returns .*; use another"):
        built(FitNet(["a"], ["c"]), *output_pair(form, form))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="regressor must be 'conv_bn_relu' or 'conv', got 'linear'"):
        FitNet(regressor="linear")
