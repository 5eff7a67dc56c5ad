"""Criteria that compare the samples of a batch with one another or with a memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lkd.losses import CC, CRD, PKT, RKD, SP
from tests.parity.tools import Hyper, Values, built, layers, terms


def _rkd(inputs: Values, hyper: Hyper) -> Values:
    squared, eps = bool(hyper["squared"]), hyper["eps"]
    weights = hyper["distance_weight"], hyper["angle_weight"]
    parts = terms(RKD(*layers(inputs), 1.0, 1.0, squared, eps), inputs)
    loss = terms(RKD(*layers(inputs), *weights, squared, eps), inputs)["loss"]
    same = {f"loss.{peer}": loss for peer in ("repdistiller", "torchdistill", "authors")}
    return {"distance": parts["distance"], "angle": parts["angle"], "loss": loss, **same}


def _sp(inputs: Values, hyper: Hyper) -> Values:
    loss = terms(SP(*layers(inputs)), inputs)["loss"]
    return {"loss": loss, "loss.repdistiller": loss, "weighted": hyper["feat_weight"] * loss}


def _pkt(inputs: Values, hyper: Hyper) -> Values:
    loss = terms(PKT(*layers(inputs), hyper["eps"]), inputs)["loss"]
    same = {f"loss.{peer}": loss for peer in ("repdistiller", "torchdistill")}
    return {"loss": loss, **same, "weighted": hyper["feat_weight"] * loss}


def _cc(inputs: Values, hyper: Hyper) -> Values:
    """The mean of squares is the paper's; torchdistill divides the norm itself by B², and does not normalise."""
    settings = {"feat_dim": None, "gamma": hyper["gamma"], "order": int(hyper["max_p"]), "normalize": False}
    batch_size = len(inputs["student_features.0"])
    norms = {}
    for kernel in ("gaussian", "bilinear"):
        loss = terms(CC(*layers(inputs), kernel=kernel, **settings), inputs)["loss"]
        norms[kernel] = loss.sqrt() * batch_size
    return {
        "frobenius_gaussian_unnormalised": norms["gaussian"],
        **{f"loss.torchdistill_{kernel}": norm / batch_size**2 for kernel, norm in norms.items()},
        "loss.repdistiller": terms(CC(*layers(inputs), feat_dim=None, form="neighbours"), inputs)["loss"],
    }


class _GivenCRD(CRD):
    """With the images drawn as in the fixture."""

    drawn: Tensor

    def draw(self, index: Tensor, target: Tensor) -> Tensor:
        return self.drawn


def _crd(inputs: Values, hyper: Hyper) -> Values:
    """Two steps; the files' first memory is the student's, and its normalisation that of the student's embeddings."""
    settings = hyper["temperature"], hyper["momentum"], True, hyper["eps"]
    shape = inputs["memory_v1"].shape
    criterion = built(_GivenCRD("student", "teacher", *shape, int(hyper["nce_k"]), *settings), inputs)
    criterion.student_memory.copy_(inputs["memory_v1"])
    criterion.teacher_memory.copy_(inputs["memory_v2"])
    names = {"student_embedding": "embed_s", "teacher_embedding": "embed_t"}
    kinds = [(own, name, kind) for own, name in names.items() for kind in ("weight", "bias")]
    parameters = {f"{own}.1.{kind}": inputs[f"params.{name}.linear.{kind}"] for own, name, kind in kinds}
    values = {}
    for step in ("", "_step2"):
        features = {f"{name}_features.0": inputs[f"{name}_features{step}.0"] for name in ("student", "teacher")}
        index, criterion.drawn = inputs[f"index{step}"], inputs[f"contrast_index{step}"][:, 1:]
        assert torch.equal(index, inputs[f"contrast_index{step}"][:, 0])
        target = torch.zeros_like(index)
        values[f"loss{step}"] = terms(criterion, {**inputs, **features, "target": target}, index, **parameters)["loss"]
        values[f"memory_v1_after{step}"] = criterion.student_memory.clone()
        values[f"memory_v2_after{step}"] = criterion.teacher_memory.clone()
    values["Z_v1"], values["Z_v2"] = criterion.log_z.exp()
    return {**values, **{f"loss.{peer}": values["loss"] for peer in ("mdistiller", "torchdistill")}}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "rkd": _rkd,
    "sp": _sp,
    "pkt": _pkt,
    "cc": _cc,
    "crd": _crd,
}
