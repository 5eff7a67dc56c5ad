"""Criteria that compare how features change from layer to layer, and those of one layer's channels and factors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from lkd import functional as KF
from lkd.losses import FSP, FT, ICKD
from tests.parity.tools import Hyper, Values, built, layers, terms


def _fsp(inputs: Values, hyper: Hyper) -> Values:
    """torchdistill's loss is not lkd's, but its matrices are: the lengths of the columns of their difference."""
    ours, theirs = ([inputs[layer] for layer in names] for names in layers(inputs))
    differences = [
        KF.fsp_matrix(*student) - KF.fsp_matrix(*teacher)
        for student, teacher in zip(pairwise(ours), pairwise(theirs), strict=True)
    ]
    columns = torch.stack([difference.norm(dim=1).sum(1).mean() for difference in differences]).sum()
    benchmark = built(FSP(*layers(inputs), pooling="mean", reduction="mean"), inputs)
    return {"loss.repdistiller": terms(benchmark, inputs)["loss"], "loss.torchdistill": columns}


def _ft(inputs: Values, hyper: Hyper) -> Values:
    """The fixture's features are the factors themselves."""
    criterion = built(FT(*layers(inputs), p=hyper["p"], reconstruction_weight=0.0), inputs)
    for name in ("encoders", "decoders", "translators"):
        setattr(criterion, name, nn.ModuleList([nn.Identity()]))
    return {"loss": terms(criterion, inputs)["loss"]}


def _ickd(inputs: Values, hyper: Hyper) -> Values:
    """torchdistill divides by the batch size once more."""
    names = {"conv2d.weight": "0.weight", "l2norm.weight": "1.weight", "l2norm.bias": "1.bias"}
    given = {f"connectors.0.{own}": inputs[f"params.embed_s.{name}"] for name, own in names.items()}
    loss = terms(built(ICKD(*layers(inputs)), inputs), inputs, **given)["loss"]
    samples = len(inputs["student_features.0"])
    return {"loss": loss, "loss.torchdistill_chsim_after_embed": loss / samples}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"fsp": _fsp, "ft": _ft, "ickd": _ickd}
