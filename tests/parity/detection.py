"""Criteria of detectors' features and heads, and the dense forms of criteria of feature maps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lkd import Batch
from lkd.losses import AT, FGD, MGD, PKD, FitNet
from tests.parity.tools import Hyper, Values, built, layers, terms


def _named(inputs: Values) -> Values:
    """The features of student and teacher by the names that `layers` finds: `student`, or `student.0`, ..."""
    named = dict(inputs)
    for network in ("student", "teacher"):
        for key in [key for key in inputs if key.partition(".")[0] == network]:
            named[f"{network}_features.{key.partition('.')[2] or 0}"] = inputs[key]
    return named


def _parameters(inputs: Values, **names: str) -> Values:
    """The fixture's parameters by lkd's names: part there, without dots, to part here."""
    given = {}
    for key, value in inputs.items():
        kind, _, name = key.partition(".")
        part, _, rest = name.partition(".")
        if kind == "params" and part in names:
            given[f"{names[part]}.{rest}"] = value
    return given


def _pkd(inputs: Values, hyper: Hyper) -> Values:
    named = _named(inputs)
    criterion = built(PKD(*layers(named), resize_student=bool(hyper["resize_student"])), named)
    loss = terms(criterion, named)["loss"]
    return {"loss": loss, "loss.crosskd": loss}


def _mgd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has the random numbers."""
    named = _named(inputs)
    criterion = built(MGD(*layers(named), mask_ratio=hyper["mask_ratio"], mask="pixels"), named)
    criterion.uniform = lambda feature: inputs["uniform"]
    given = _parameters(inputs, align="aligners.0", generation="generators.0")
    loss = terms(criterion, named, **given)["loss"]
    return {"loss": loss, "weighted": hyper["alpha"] * loss, "loss.mmrazor": loss}


def _fitnet(inputs: Values, hyper: Hyper) -> Values:
    named = _named(inputs)
    criterion = built(FitNet(*layers(named), regressor="conv"), named)
    return {"loss": terms(criterion, named, **_parameters(inputs, conv="regressors.0"))["loss"]}


def _at(inputs: Values, hyper: Hyper) -> Values:
    named = _named(inputs)
    loss = terms(built(AT(*layers(named)), named), named)["loss"]
    return {"loss": loss, "loss.mmrazor": loss}


def _fgd(inputs: Values, hyper: Hyper) -> Values:
    """The bias before the softmax, which changes nothing, is left out."""
    named = _named(inputs)
    parts = {"align": "aligners.0"}
    for network in ("student", "teacher"):
        parts |= {f"channel_add_conv_{network[0]}": f"{network}_blocks.0.transform"}
    given = _parameters(inputs, **parts)
    for network in ("student", "teacher"):
        given[f"{network}_blocks.0.scores.weight"] = inputs[f"params.conv_mask_{network[0]}.weight"]
    height, width = (int(size) for size in hyper["image_size"])
    images = [torch.zeros(3, height, width)] * len(inputs["student"])
    boxes = [{"boxes": inputs[f"boxes.{number}"]} for number in range(len(images))]
    weights = {"foreground": "alpha", "background": "beta", "attention": "gamma", "relation": "lambda"}

    def found(**weights: float) -> Values:
        criterion = FGD(*layers(named), **weights, temperature=hyper["temperature"])
        return terms(built(criterion, named), named, batch=Batch(images, boxes), **given)

    published = found(**{f"{name}_weight": hyper[key] for name, key in weights.items()})
    return {**found(**{f"{name}_weight": 1.0 for name in weights}), "loss": published["loss"]}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "fgd": _fgd,
    "pkd": _pkd,
    "mgd_dense": _mgd,
    "fitnet_dense": _fitnet,
    "at_dense": _at,
}
