"""ICKD: inter-channel correlation for knowledge distillation."""

from __future__ import annotations

import torch

from lkd import functional as KF
from lkd.losses import ICKD
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import stages

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 4)}

OTHER = {"c": (5, 4, 4), "d": (7, 8, 6)}

CASES = {
    "ICKD": FeatureCase(lambda: ICKD(*LAYERS), student=STUDENT, teacher=OTHER, batch_mean=True),
}


def _ickd(inputs: Values, hyper: Hyper) -> Values:
    """torchdistill divides by the batch size twice."""
    names = {"conv2d.weight": "0.weight", "l2norm.weight": "1.weight", "l2norm.bias": "1.bias"}
    given = {f"connectors.0.{own}": inputs[f"params.embed_s.{name}"] for name, own in names.items()}
    loss = parity.terms(parity.built(ICKD(*parity.layers(inputs)), inputs), inputs, **given)["loss"]
    samples = len(inputs["student_features.0"])
    return {"loss": loss, "loss.torchdistill_chsim_after_embed": loss / samples}


PARITY = {"ickd": _ickd}


def test_correlations_are_invariant_to_position_and_scale() -> None:
    feature = stages(3)[1]
    other = 7 * feature.flatten(2)[:, :, torch.randperm(16)].view_as(feature)
    assert KF.ickd_loss(other, feature) < 1e-20
    assert KF.ickd_loss(feature[:, torch.arange(7, -1, -1)], feature) > 1e-3
