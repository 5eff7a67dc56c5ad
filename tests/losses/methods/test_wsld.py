"""WSLD: weighted soft labels distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import functional as KF
from lkd.losses import WSLD
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "WSLD": LogitCase(WSLD, zero_at_best=False, reads_target=True),
}


def _wsld(inputs: Values, hyper: Hyper) -> Values:
    values = parity.weighted(WSLD(hyper["temperature"]), inputs, distill=hyper["alpha"])
    return {"loss": values["weighted"] - values["ce"]}


PARITY = {"wsld": _wsld}


def test_wsld_weights_are_a_ratio_of_cross_entropies(logits, target) -> None:
    student, teacher = logits
    weights = 1 - torch.exp(-F.cross_entropy(student, target, reduction="none") / _ce(teacher, target))
    soft = F.cross_entropy(student / 4, F.softmax(teacher / 4, dim=1), reduction="none")
    torch.testing.assert_close(KF.wsld_loss(student, teacher, target, 4.0), 16 * (weights * soft).mean())


def _ce(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none") + 1e-7
