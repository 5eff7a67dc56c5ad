"""Criteria of dense prediction: maps of logits or features, and masks."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lkd import functional as KF
from lkd.losses import CWD, IFVD, SKDS, DistillLoss
from lkd.types import IGNORE_INDEX
from tests.parity.tools import Hyper, Values, built, terms


def _as_features(inputs: Values) -> Values:
    """The fixture's maps as features of one layer."""
    return {**inputs, "student_features.0": inputs["student"], "teacher_features.0": inputs["teacher"]}


def _terms(criterion: DistillLoss, inputs: Values, **parameters: Tensor) -> Values:
    """The terms of a criterion of one layer, which is built here."""
    features = _as_features(inputs)
    return terms(built(criterion, features), features, **parameters)


def _cwd(inputs: Values, hyper: Hyper) -> Values:
    """CIRKD divides by the student's channels, and has no adapter for logits."""
    if hyper["tap"] == "logits":
        logits = {f"{network}_logits": inputs[network] for network in ("student", "teacher")}
        loss = terms(built(CWD(temperature=hyper["temperature"]), logits), logits)["loss"]
    else:
        weights = {f"aligners.0.{name.removeprefix('params.conv.')}": inputs[name] for name in inputs if "." in name}
        loss = _terms(CWD(["student"], ["teacher"], hyper["temperature"]), inputs, **weights)["loss"]
    channels = [inputs[network].shape[1] for network in ("teacher", "student")]
    return {"loss": loss, "loss.mmrazor": loss, "loss.cirkd": loss * channels[0] / channels[1]}


def _skds(inputs: Values, hyper: Hyper) -> Values:
    """`loss` has lkd's gradient only if the norms take part in it; CIRKD pools windows of 2x2 pixels."""
    loss = _terms(SKDS(["student"], ["teacher"], hyper["pool_scale"]), inputs)["loss"]
    pooled = (F.max_pool2d(inputs[network], 2, ceil_mode=True) for network in ("student", "teacher"))
    name = "loss" if hyper["norm_gradient"] else "loss.full_gradient"
    return {name: loss, "loss.cirkd": KF.skds_loss(*pooled)}


def _target(inputs: Values, num_classes: int) -> Tensor:
    """The masks as lkd's tasks have them: other labels than classes are to be ignored."""
    target = inputs["target"]
    return target.masked_fill((target < 0) | (target >= num_classes), IGNORE_INDEX)


def _ifvd(inputs: Values, hyper: Hyper) -> Values:
    """The criterion takes the number of classes from the logits, which the fixture does not have."""
    classes = int(hyper["classes"])
    logits = inputs["student"].new_zeros(1, classes, 1, 1)
    given = {**inputs, "student_logits": logits, "target": _target(inputs, classes)}
    loss = _terms(IFVD(["student"], ["teacher"]), given)["loss"]
    return dict.fromkeys(("loss", "loss.cirkd", "loss.cwd_repo"), loss)


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"cwd": _cwd, "skds": _skds, "ifvd": _ifvd}
