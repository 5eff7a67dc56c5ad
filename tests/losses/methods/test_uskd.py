"""USKD: universal self-knowledge distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import USKD
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values


def _zipf(teacher: Tensor, target: Tensor) -> Tensor:
    """Return logits that rank the label first and weight the others by 1 / rank, in the order of the classes."""
    classes = torch.arange(teacher.shape[1])
    rank = classes + 2 - (classes > target.unsqueeze(1)).int()
    return (-rank.to(teacher).log()).scatter(1, target.unsqueeze(1), 60.0)


def _example() -> USKD:
    criterion = USKD("layer")
    probe = Probe(criterion, Outputs(torch.zeros(1, 5), {"layer": torch.ones(1, 3)}))
    criterion.build(probe, probe)
    torch.nn.init.zeros_(criterion.head.weight)  # the ranks are then those of the student
    torch.nn.init.zeros_(criterion.head.bias)
    return criterion


CASES = {
    "USKD": LogitCase(_example, best=_zipf, zero_at_best=False, batch_mean=False, reads_target=True),
}


def _uskd(inputs: Values, hyper: Hyper) -> Values:
    criterion = parity.built(USKD("layer", hyper["alpha"], hyper["beta"], hyper["mu"]), inputs)
    head = {f"head.{name}": inputs[f"params.fc.{name}"] for name in ("weight", "bias")}
    return {"loss": parity.terms(criterion, inputs, **head)["loss"]}


PARITY = {"uskd": _uskd}


def test_uskd_reads_maps_and_vectors(logits, target) -> None:
    feature = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    values = []
    for given in (feature, feature.mean((2, 3))):
        torch.manual_seed(0)
        criterion = USKD("layer", alpha=2.0, beta=0.5, mu=0.1)
        student = Outputs(logits[0], {"layer": given})
        criterion.build(Probe(criterion, student), Probe(criterion, student))
        terms = criterion.double()(student, Outputs(logits[1], {}), Batch(None, target))
        weak = criterion.head(feature.mean((2, 3)))
        whole = KF.uskd_loss(logits[0], weak, target, alpha=2.0, beta=0.5, mu=0.1)
        torch.testing.assert_close(torch.stack(list(terms.values())).sum(), whole)
        values.append(whole)
    torch.testing.assert_close(*values)


def test_invalid_layers() -> None:
    criterion = USKD("tokens")
    probe = Probe(criterion, Outputs(torch.zeros(1, 5), {"tokens": torch.zeros(1, 7, 3)}))
    with pytest.raises(ValueError, match=r"layer 'tokens' returns \(1, 7, 3\); use another layer"):
        criterion.build(probe, probe)
