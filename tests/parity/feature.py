"""Criteria that compare feature maps pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable

from lkd.losses import AT, NST, FitNet
from tests.parity.tools import Hyper, Values, built, layers, terms


def _at(inputs: Values, hyper: Hyper) -> Values:
    loss = terms(built(AT(*layers(inputs), p=hyper["p"]), inputs), inputs)["loss"]
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss}


def _fitnet(inputs: Values, hyper: Hyper) -> Values:
    criterion = built(FitNet(*layers(inputs)), inputs)
    names = {"conv": "regressors.0.0", "bn": "regressors.0.1"}
    given = {f"{names[part]}.{kind}": inputs[f"params.{part}.{kind}"] for part in names for kind in ("weight", "bias")}
    loss = terms(criterion, inputs, **given)["loss"]
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss}


def _nst(inputs: Values, hyper: Hyper) -> Values:
    loss = terms(built(NST(*layers(inputs)), inputs), inputs)["loss"]
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"at": _at, "fitnet": _fitnet, "nst": _nst}
