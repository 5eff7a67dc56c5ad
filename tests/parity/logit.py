"""Criteria of logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lkd.callbacks import Schedule
from lkd.losses import (
    CSKD,
    CTKD,
    DIST,
    DKD,
    KD,
    NKD,
    OFAKD,
    RLD,
    SKD,
    TTM,
    USKD,
    WSLD,
    WTTM,
    DeiT,
    DistillLoss,
    LogitMSE,
    LogitStandardization,
)
from tests.parity.tools import Hyper, Values, built, terms, weighted


def _kd(inputs: Values, hyper: Hyper) -> Values:
    return weighted(KD(hyper["temperature"]), inputs, hyper["kd_weight"], hyper["ce_weight"])


def _dkd(inputs: Values, hyper: Hyper) -> Values:
    warmup = Schedule("distill_weight", hyper["warmup_epochs"]).factor(hyper["epoch_for_weighted"] - 1)
    criterion = DKD(hyper["alpha"], hyper["beta"], hyper["temperature"])
    parts = terms(DKD(1.0, 1.0, hyper["temperature"]), inputs)
    values = weighted(criterion, inputs, distill=warmup, hard=hyper["ce_weight"])
    return {**values, "tckd": parts["target"], "nckd": parts["nontarget"]}


def _logit_std_kd(inputs: Values, hyper: Hyper) -> Values:
    temperature, eps = hyper["temperature"], hyper["eps"]
    criterion = LogitStandardization(KD(temperature), eps)
    dkd = LogitStandardization(DKD(hyper["dkd_alpha"], hyper["dkd_beta"], temperature), eps)
    values = weighted(criterion, inputs, hyper["kd_weight"], hyper["ce_weight"])
    return {**values, "loss.dkd": terms(dkd, inputs)["loss"]}


def _dist(inputs: Values, hyper: Hyper) -> Values:
    criterion = DIST(hyper["beta"], hyper["gamma"], hyper["tau"], hyper["eps"])
    parts = terms(DIST(1.0, 1.0, hyper["tau"], hyper["eps"]), inputs)
    return {**weighted(criterion, inputs), "inter": parts["inter"], "intra": parts["intra"]}


def _nkd(inputs: Values, hyper: Hyper) -> Values:
    criterion = NKD(hyper["gamma"], hyper["temperature"])
    return {**weighted(criterion, inputs), "target_part": terms(criterion, inputs)["target"]}


def _wsld(inputs: Values, hyper: Hyper) -> Values:
    values = weighted(WSLD(hyper["temperature"]), inputs, distill=hyper["alpha"])
    return {"loss": values["weighted"] - values["ce"]}


def _ctkd(inputs: Values, hyper: Hyper) -> Values:
    criterion = CTKD(hyper["t_start"], hyper["t_end"], reversal=-hyper["lambda_"])
    return {"loss": terms(criterion, inputs, theta=inputs["params.global_T"])["loss"]}


def _skd(inputs: Values, hyper: Hyper) -> Values:
    return terms(SKD(hyper["temperature"], hyper["tikhonov"]), inputs)


def _uskd(inputs: Values, hyper: Hyper) -> Values:
    criterion = built(USKD("layer", hyper["alpha"], hyper["beta"], hyper["mu"]), inputs)
    head = {f"head.{name}": inputs[f"params.fc.{name}"] for name in ("weight", "bias")}
    return {"loss": terms(criterion, inputs, **head)["loss"]}


def _logits(criterion: DistillLoss, inputs: Values) -> Values:
    """A criterion of logits, for the fixtures that call them `student` and `teacher`."""
    names = {"student": "student_logits", "teacher": "teacher_logits"}
    return terms(criterion, {names.get(name, name): tensor for name, tensor in inputs.items()})


def _cskd(inputs: Values, hyper: Hyper) -> Values:
    """The partners' logits are the second view; the fixture has no labels, which only tell whether an image has one."""
    logits = torch.cat([inputs["student"], inputs["teacher"]])
    target = torch.zeros(len(logits), dtype=torch.int64)
    return terms(CSKD(hyper["temperature"]), {"student_logits": logits, "target": target})


def _ofa(inputs: Values, hyper: Hyper) -> Values:
    """The exits are lkd's own and weigh 0 here: what is compared is the loss of the student's own logits."""
    names = {"student": "student_logits", "teacher": "teacher_logits"}
    given = {names.get(name, name): tensor for name, tensor in inputs.items()}
    given["student_features.0"] = torch.ones(len(inputs["student"]), 4, 2, 2, dtype=torch.float64)
    criterion = built(OFAKD(["layer"], hyper["eps"], hyper["temperature"], exits_weight=0.0), given)
    return terms(criterion, given, **dict(criterion.named_parameters()))


def _deit_hard(inputs: Values, hyper: Hyper) -> Values:
    heads = {"student_features.0": inputs["class_token"], "student_features.1": inputs["distillation_token"]}
    given = {**heads, "student_logits": sum(heads.values()) / 2, "teacher_logits": inputs["teacher"]}
    criterion = DeiT("class", "distillation", token_weight=hyper["alpha"], kind="hard")
    return terms(criterion, {**given, "target": inputs["target"]})


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "kd": _kd,
    "dkd": _dkd,
    "logit_std_kd": _logit_std_kd,
    "dist": _dist,
    "nkd": _nkd,
    "wsld": _wsld,
    "ctkd_global": _ctkd,
    "skd": _skd,
    "uskd": _uskd,
    "ttm": lambda inputs, hyper: _logits(TTM(1 / hyper["exponent"]), inputs),
    "wttm": lambda inputs, hyper: _logits(WTTM(1 / hyper["exponent"]), inputs),
    "rld": lambda inputs, hyper: _logits(RLD(**hyper), inputs),
    "logit_mse": lambda inputs, hyper: _logits(LogitMSE(), inputs),
    "cskd": _cskd,
    "ofa": _ofa,
    "deit_hard": _deit_hard,
}
