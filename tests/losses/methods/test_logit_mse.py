"""LogitMSE: logit regression."""

from __future__ import annotations

from lkd.losses import LogitMSE
from tests.losses import parity
from tests.losses.cases import LogitCase

CASES = {
    "LogitMSE": LogitCase(LogitMSE, shift_invariant=False),
}

PARITY = {"logit_mse": lambda inputs, hyper: parity.logits(LogitMSE(), inputs)}
