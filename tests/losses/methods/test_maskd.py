"""MasKD: masked distillation with receptive tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import MasKD
from tests.losses import parity
from tests.losses.cases import LAYERS, SegmentationCase
from tests.losses.parity import Hyper, Values

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 6)}

OTHER = {"c": (5, 8, 4), "d": (7, 6, 8)}

CASES = {
    "MasKD": SegmentationCase(MasKD, batch_mean=True),
    "MasKD-features": SegmentationCase(
        lambda: MasKD(*LAYERS, num_tokens=3), student=STUDENT, teacher=OTHER, batch_mean=True
    ),
    "MasKD-frozen": SegmentationCase(
        lambda: MasKD(learn_tokens=False), teacher_logits=(8, 4), zero_at_equality=True, batch_mean=True
    ),
}


def _maskd(inputs: Values, hyper: Hyper) -> Values:
    """In the fixture, the loss also has a gradient for the tokens; the authors' detection code uses other constants."""
    student, teacher, tokens = (inputs[name] for name in ("student", "teacher", "params.mask_token"))
    logits = {"student_logits": student, "teacher_logits": teacher}
    criterion = parity.built(MasKD(num_tokens=len(tokens)), logits)
    found = parity.terms(criterion, logits, **{"tokens.0": tokens})
    masks = KF.maskd_masks(teacher, tokens)
    loss = KF.maskd_loss(student, teacher, masks)
    torch.testing.assert_close(found["map"], loss, rtol=1e-12, atol=0)
    (own,) = torch.autograd.grad(found["map"], student, retain_graph=True)
    assert torch.equal(own, torch.autograd.grad(loss, student, retain_graph=True)[0])
    return {
        "loss": loss,
        "loss.detection": 2 * KF.maskd_loss(student, teacher, masks, eps=0.0),
        "diversity": found["diversity"],
    }


PARITY = {"maskd": _maskd}


def test_tokens_learn_only_from_the_diversity_loss() -> None:
    teacher, student = torch.randn(2, 2, 3, 4, 4)
    student.requires_grad_()
    for learn in (True, False):
        criterion = MasKD(num_tokens=4, learn_tokens=learn)
        probe = Probe(nn.Identity(), Outputs(teacher[:1], {}))
        criterion.build(probe, probe)
        terms = criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, None))
        assert set(terms) == ({"map", "diversity"} if learn else {"map"})
        tokens = criterion.tokens[0]
        assert tokens.shape == (4, 3)
        assert tokens.requires_grad == learn
        terms["map"].backward()
        assert tokens.grad is None
        assert student.grad is not None


def test_learning_reduces_the_overlap() -> None:
    torch.manual_seed(0)
    teacher, criterion = torch.randn(4, 3, 8, 8), MasKD(num_tokens=3)
    probe = Probe(nn.Identity(), Outputs(teacher[:1], {}))
    criterion.build(probe, probe)
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.1)
    found = []
    for _ in range(50):
        terms = criterion(Outputs(teacher, {}), Outputs(teacher, {}), Batch(None, None))
        optimizer.zero_grad()
        terms["diversity"].backward()
        optimizer.step()
        found.append(terms["diversity"].item())
    assert found[0] > 0.95
    assert found[-1] < 0.5


def test_reads_logits_only_without_layers() -> None:
    assert MasKD().reads_logits
    assert not MasKD(["a"], ["a"]).reads_logits


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
        MasKD(num_tokens=1)
