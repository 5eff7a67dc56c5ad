"""Criteria that read classifiers or tokens, or all layers at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from lkd.losses import CATKD, SRRL, DISTPlus, SemCKD, SimKD, ViTKD
from tests.parity.tools import Hyper, Values, built, layers, outputs, terms


def _classifier(inputs: Values) -> nn.Module:
    """A network whose classifier is the fixture's."""
    head = nn.Linear(*inputs["teacher_fc.weight"].T.shape).double()
    head.load_state_dict({name: inputs[f"teacher_fc.{name}"] for name in ("weight", "bias")})
    return nn.Sequential(head)


def _parameters(inputs: Values, **names: str) -> Values:
    """The fixture's parameters by lkd's names: prefix there to prefix here."""
    given = {}
    for key, value in inputs.items():
        for theirs, ours in names.items():
            prefix = f"params.{theirs}."
            if key.startswith(prefix):
                given[f"{ours}.{key.removeprefix(prefix)}"] = value
    return given


def _cat_kd(inputs: Values, hyper: Hyper) -> Values:
    (ours,), (theirs,) = layers(inputs)
    settings = {"resolution": hyper["resolution"], "normalize": hyper["normalize"]}
    loss = terms(built(CATKD(ours, theirs, None, None, **settings), inputs), inputs)["loss"]
    return {"loss": loss, "weighted": hyper["weight"] * loss}


def _srrl(inputs: Values, hyper: Hyper) -> Values:
    (ours,), (theirs,) = layers(inputs)
    given = _parameters(inputs, Connectors="connector")

    def found(weight: float) -> Values:
        criterion = SRRL(ours, theirs, regression_weight=weight)
        return terms(built(criterion, inputs, teacher=_classifier(inputs)), inputs, **given)

    plain = found(1.0)
    return {
        "fm": plain["fm"],
        "sr": plain["sr"],
        "loss": found(hyper["weight"])["loss"],
        "loss.clskd_alpha1_beta5": found(5.0)["loss"],
    }


def _simkd(inputs: Values, hyper: Hyper) -> Values:
    (ours,), (theirs,) = layers(inputs)
    criterion = built(SimKD(ours, theirs, factor=int(hyper["factor"])), inputs, teacher=_classifier(inputs))
    given = _parameters(inputs, transfer="projector")
    head = {name: tensor for name, tensor in criterion.named_parameters() if name.startswith("head.")}
    loss = terms(criterion, inputs, **given, **head)["loss"]
    with torch.no_grad():
        for name, tensor in given.items():
            criterion.get_parameter(name).copy_(tensor)
        answer = criterion.answer(outputs(criterion, inputs)[0])
    return {"loss": loss, "prediction": answer.logits, "transformed": answer.features[criterion.projected_layer]}


def _semckd(inputs: Values, hyper: Hyper) -> Values:
    settings = {"factor": int(hyper["factor"]), "temperature": hyper["soft"]}
    criterion = SemCKD(*layers(inputs), batch_size=len(inputs["student_features.0"]), **settings)
    built(criterion, inputs)
    names = {f"query_{number}": f"queries.{number}" for number in range(len(criterion.student_layers))}
    names |= {f"key_{number}": f"keys.{number}" for number in range(len(criterion.teacher_layers))}
    pairs = product(range(len(criterion.student_layers)), range(len(criterion.teacher_layers)))
    names |= {f"regressor{own}{other}.regressor": f"regressors.{number}" for number, (own, other) in enumerate(pairs)}
    given = _parameters(inputs, **names)
    loss = terms(criterion, inputs, **given)["loss"]
    with torch.no_grad():
        for name, tensor in given.items():
            criterion.get_parameter(name).copy_(tensor)
        student, teacher = outputs(criterion, inputs)
        attention = criterion.attention(list(student.features.values()), list(teacher.features.values()))
    return {"loss": loss, "attention": attention}


def _dist_plus(inputs: Values, hyper: Hyper) -> Values:
    found = terms(built(DISTPlus(*layers(inputs), temperature=hyper["tau"]), inputs), inputs)
    return {"spatial": found["spatial"], "channel_torchdistill": 1 - found["channel"]}


class _NoiseGiven(ViTKD):
    """The noise is the fixture's."""

    given: Tensor

    def noise(self, tokens: Tensor) -> Tensor:
        return self.given


def _vitkd(inputs: Values, hyper: Hyper) -> Values:
    features = {
        f"{network}_features.{number}": tokens
        for network in ("student", "teacher")
        for number, tokens in enumerate([*inputs[f"{network}_low"].unbind(1), inputs[f"{network}_high"]])
    }
    settings = {"alpha": hyper["alpha"], "beta": hyper["beta"], "mask_ratio": hyper["lambda_"]}
    criterion = _NoiseGiven(*layers(features), **settings, student_prefix_tokens=0, teacher_prefix_tokens=0)
    criterion.given = inputs["noise"]
    given = _parameters(inputs, align2="shallow", align="last", generation="generation")
    criterion = built(criterion, features)
    return {"loss": terms(criterion, features, **given, mask_token=inputs["params.mask_token"])["loss"]}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "cat_kd": _cat_kd,
    "srrl": _srrl,
    "simkd": _simkd,
    "semckd": _semckd,
    "dist_plus": _dist_plus,
    "vitkd": _vitkd,
}
