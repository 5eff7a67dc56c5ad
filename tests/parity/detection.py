"""Criteria of detectors' features and heads, and the dense forms of criteria of feature maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lkd import Batch
from lkd import functional as KF
from lkd.losses import AT, FBKD, FGD, LD, MGD, PKD, FitNet
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


def _fbkd(inputs: Values, hyper: Hyper) -> Values:
    """mmrazor pools twice, which is to pool by twice the size; a term by itself has the weight 1."""
    named = _named(inputs)
    parts = {
        "student.channel_wise_adaptation": "channel",
        "student.spatial_wise_adaptation": "spatial",
        "student.adaptation_layers": "feature",
        "student.non_local_adaptation": "nonlocal_map",
    }
    for network in ("student", "teacher"):
        block = f"{network}.{network}_non_local"
        names = {"g.conv": "values", "theta.conv": "theta", "phi.conv": "phi", "conv_out.conv": "out"}
        parts |= {f"{block}.{part}": f"{network}_block.{own}" for part, own in names.items()}
        parts |= {f"{block}.conv_out.bn.weight": f"{network}_block.gain"}
        parts |= {f"{block}.conv_out.bn.bias": f"{network}_block.bias"}
    given = {}
    for part, own in parts.items():
        prefix = f"params.{part}"
        given |= {f"levels.0.{own}{key.removeprefix(prefix)}": inputs[key] for key in inputs if key.startswith(prefix)}
    names = ("feature", "channel", "spatial", "nonlocal")

    def found(pool: int, weights: dict[str, float]) -> Values:
        settings = {"temperature": hyper["spatial_temperature"], "reduction": int(hyper["reduction"]), "pool": pool}
        criterion = FBKD(*layers(named), **{f"{name}_weight": weights[name] for name in names}, **settings)
        return terms(built(criterion, named), named, **given)

    pool, published = int(hyper["pool"] or 1), {name: hyper[f"{name}_weight"] for name in names}
    one = dict.fromkeys(names, 1.0)
    return {
        **found(pool, one),
        "loss": found(pool, published)["loss"],
        "loss.mmrazor": found(2 * pool, published)["loss"],
        "nonlocal.mmrazor": found(2 * pool, one)["nonlocal"],
    }


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


def _ld(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has rows, and the weights themselves; CrossKD's sum over the bins has a constant in the divisor."""
    named = {
        "student_features.0": inputs["student"].T[None, :, :, None],
        "student_features.1": inputs["weight"].logit()[None, None, :, None],
        "teacher_features.0": inputs["teacher"].T[None, :, :, None],
    }
    criterion = LD(["a"], ["c"], ["b"], temperature=hyper["temperature"], avg_factor=hyper["avg_factor"])
    loss = terms(built(criterion, named), named)["loss"]
    factor = (hyper["reg_max"] + 1) * hyper["avg_factor"] / (hyper["avg_factor"] + torch.finfo(torch.float32).eps)
    return {"loss": loss, "weighted": hyper["weight"] * loss, "loss.crosskd_sum": factor * loss}


def _crosskd(inputs: Values, hyper: Hyper) -> Values:
    """What the heads predict is given, and which positions count."""

    def rows(name: str) -> Tensor:
        return inputs[name].movedim(1, 3).flatten(0, 2)

    weight = inputs["label_weights"].flatten()
    logits = rows("student_cls"), rows("teacher_cls")
    quality = logits[1].amax(1).sigmoid() * (weight != 0)
    cls = KF.crosskd_class_loss(*logits, weight, hyper["beta"], hyper["avg_factor"])
    reg = KF.crosskd_box_loss(rows("student_reg"), rows("teacher_reg"), quality, hyper["temperature"])
    aligned = KF.crosskd_aligned(inputs["student_feature"], inputs["teacher_feature"])
    terms = {"cls": hyper["cls_weight"] * cls, "reg": hyper["reg_weight"] * reg}
    return {**terms, "loss": terms["cls"] + terms["reg"], "aligned": aligned}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "crosskd": _crosskd,
    "fbkd": _fbkd,
    "fgd": _fgd,
    "ld": _ld,
    "pkd": _pkd,
    "mgd_dense": _mgd,
    "fitnet_dense": _fitnet,
    "at_dense": _at,
}
