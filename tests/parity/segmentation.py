"""Criteria of dense prediction: maps of logits or features, and masks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lkd.losses import CWD, DistillLoss
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


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"cwd": _cwd}
