"""Knowledge review."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lkd import functional as KF
from lkd.callbacks import Schedule
from lkd.losses import ReviewKD
from tests.parity.tools import Hyper, Values, built, layers, terms

PARTS = {"conv1": "reduce", "conv2": "expand", "att_conv": "attention"}


def _name(parameter: str) -> str:
    """`abfs.0.conv1.1.weight` as lkd has it."""
    _, number, part, position, kind = parameter.split(".")
    own = PARTS[part] if part == "att_conv" else f"{PARTS[part]}.{position}"
    return f"fusions.{number}.{own}.{kind}"


def _reviewkd(inputs: Values, hyper: Hyper) -> Values:
    if hyper["part"] == "hcl only":
        pairs = zip(*layers(inputs), strict=True)
        loss = torch.stack([KF.hcl_loss(inputs[ours], inputs[theirs]) for ours, theirs in pairs]).sum()
        return dict.fromkeys(("loss", "loss.dvlab", "loss.torchdistill"), loss)
    levels = sum(name.startswith("student_features.") for name in inputs)
    features = {f"student_features.{levels}": inputs["student_pooled"]}
    features |= {f"teacher_features.{levels}": inputs["teacher_pooled"]}
    features |= {name.replace("_preact", ""): value for name, value in inputs.items() if "_features." in name}
    given = {_name(key.removeprefix("params.")): value for key, value in inputs.items() if key.startswith("params.")}
    loss = terms(built(ReviewKD(*layers(features)), features), features, **given)["loss"]
    warmup = Schedule("distill_weight", epochs=int(hyper["warmup_epochs"])).factor(4)  # the fifth epoch
    return {"loss": loss, "weighted_epoch5": hyper["weight"] * warmup * loss}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"reviewkd": _reviewkd}
