"""Criteria that read several views of each image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lkd import functional as KF
from lkd.losses import MLKD, SSKD, LogitStandardization
from tests.parity.tools import Hyper, Values, built, terms, weighted


def _mlkd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has the views apart; the authors add two cross-entropies, lkd takes their mean."""
    networks = ("student_logits", "teacher_logits")
    both = {name: torch.cat([inputs[f"{name}_{view}"] for view in ("weak", "strong")]) for name in networks}
    both["target"] = inputs["target"].repeat(2)
    temperatures, weight = (hyper["temperature"], 3.0, 5.0, 2.0, 6.0), hyper["kd_weight"]
    criterion = MLKD("code", temperatures, hyper["percentile"])
    total = weighted(criterion, both, weight, 2 * hyper["ce_weight"], views=2)
    parts, standardized = (terms(each, both) for each in (criterion, LogitStandardization(criterion)))
    single = inputs["student_logits_weak"], inputs["teacher_logits_weak"], hyper["temperature"]
    return {
        "loss_ce": 2 * hyper["ce_weight"] * total["ce"],
        "loss_kd": weight * parts["kd"],
        "loss_cc": weight * parts["class"],
        "loss_bc": weight * parts["batch"],
        "loss": total["weighted"],
        "loss_kd.logit_std": weight * standardized["kd"],
        "kd_single": KF.kd_loss(*single),
        "cc_single": KF.mlkd_class_loss(*single),
        "bc_single": KF.mlkd_batch_loss(*single),
    }


def _by_view(rows: Tensor) -> Tensor:
    """The fixture has the four views of an image one behind the other; lkd, all first views, all second ones, ..."""
    return rows.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


def _sskd(inputs: Values, hyper: Hyper) -> Values:
    """What the heads say is given."""
    hard, kd, ss, tf = hyper["loss_weights"]
    criterion = SSKD(
        *("student", "teacher"),
        **{"kd_weight": kd, "ss_weight": ss, "tf_weight": tf, "teacher_head_weight": 0.0},
        **{"kd_temperature": hyper["kl_temp"], "ss_temperature": hyper["ss_temp"], "tf_temperature": hyper["tf_temp"]},
        **{"ss_ratio": hyper["ss_ratio"], "tf_ratio": hyper["tf_ratio"]},
    )
    views = {name: _by_view(inputs[name]) for name in ("student_logits", "teacher_logits")}
    views |= {f"{network}_features.0": _by_view(inputs[f"{network}_ss"]) for network in ("student", "teacher")}
    views["target"] = torch.cat([inputs["target"], inputs["target"].new_full((3 * len(inputs["target"]),), -100)])
    built(criterion, views)
    criterion.student_head = criterion.teacher_head = nn.Identity()
    cross_entropy = nn.functional.cross_entropy(views["student_logits"], views["target"])
    return {"loss": hard * cross_entropy + terms(criterion, views)["loss"]}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"mlkd": _mlkd, "sskd": _sskd}
