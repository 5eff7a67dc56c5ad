"""Logit criteria on the pixels of maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd.losses import AT, CRD, DIST, DKD, KD, NKD, TTM, LogitMSE, PerPixel, WeightedSum
from lkd.types import IGNORE_INDEX, Batch, Outputs


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 6, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (3, 6, 7), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORE_INDEX
    return student, teacher, target


def _loss(criterion, student, teacher, target) -> torch.Tensor:
    terms = criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, target))
    return torch.stack(list(terms.values())).sum() if isinstance(terms, dict) else terms


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])


@pytest.mark.parametrize(
    "criterion", [KD(4.0), TTM(), LogitMSE(), NKD(), DKD(), WeightedSum({"kd": KD(), "mse": LogitMSE()})]
)
def test_ignored_pixels_are_excluded(criterion, maps) -> None:
    """Loss and gradient equal those of the labelled pixels alone, selected by their position."""
    student, teacher, target = maps
    student.requires_grad_()
    kept = target.flatten() != IGNORE_INDEX
    expected = _loss(criterion, _rows(student)[kept], _rows(teacher)[kept], target.flatten()[kept])
    found = _loss(PerPixel(criterion), student, teacher, target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_unlabelled_images(maps) -> None:
    student, teacher, target = maps
    student.requires_grad_()
    for criterion in (KD(), DIST(), DKD()):
        loss = _loss(PerPixel(criterion), student, teacher, torch.full_like(target, IGNORE_INDEX))
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()


def test_pixels_are_sampled_without_replacement(maps) -> None:
    student, teacher, target = maps
    labelled = int((target != IGNORE_INDEX).sum())
    every = _rows(teacher)[target.flatten() != IGNORE_INDEX]
    seen = []

    class Spy(DIST):
        def forward(self, student, teacher, batch):
            seen.append((teacher.logits, batch.target))
            return super().forward(student, teacher, batch)

    for size in (10, labelled, labelled + 20):
        _loss(PerPixel(Spy(), max_pixels=size), student, teacher, target)
        rows, targets = seen[-1]
        assert len(rows) == size
        assert (targets != IGNORE_INDEX).all()
        assert len(rows.unique(dim=0)) == min(size, labelled)
        assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in every.tolist()}


def test_dist_over_all_pixels(maps) -> None:
    student, teacher, target = maps
    target = target.clamp(min=0)
    expected = _loss(DIST(), _rows(student), _rows(teacher), target.flatten())
    torch.testing.assert_close(_loss(PerPixel(DIST()), student, teacher, target), expected, rtol=1e-12, atol=0)


def test_maps_and_masks_of_different_sizes(maps) -> None:
    """The smaller map is interpolated; the mask is resized to the maps."""
    student, teacher, target = maps
    small = student[:, :, ::2, ::2]
    enlarged = F.interpolate(small, teacher.shape[2:], mode="bilinear", align_corners=False)
    large = target.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found = _loss(PerPixel(KD()), small, teacher, large)
    torch.testing.assert_close(found, _loss(PerPixel(KD()), enlarged, teacher, target))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerPixel(AT()), "AT reads features"),
        (lambda: PerPixel(CRD()), "CRD"),
        (lambda: PerPixel(KD(), max_pixels=1), "max_pixels must be at least 2"),
    ],
)
def test_invalid_settings(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
