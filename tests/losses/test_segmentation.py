"""What criteria of dense prediction do beyond the rows of the table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CWD, DSD, IFVD, SKDS, DistillLoss, MasKD
from lkd.losses._dense import class_masks
from lkd.types import IGNORE_INDEX


def _features(feature: Tensor, classes: int = 3) -> Outputs:
    return Outputs(torch.zeros(len(feature), classes, 2, 2), {"a": feature})


def _value(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    loss = criterion(_features(student), _features(teacher), Batch(None, target))
    assert isinstance(loss, Tensor)
    return loss


def test_masks_of_classes() -> None:
    masks = class_masks(torch.tensor([[[0, 2], [IGNORE_INDEX, 1]]]), 3)
    assert masks.int().tolist() == [[[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]]]]
    with pytest.raises(ValueError, match=r"a label is out of range .* the network has 3 classes, so labels must lie"):
        class_masks(torch.tensor([[[3]]]), 3)


@pytest.mark.parametrize("kind", [CWD, DSD, MasKD])
def test_logits_of_a_classifier_are_refused(kind: type[DistillLoss]) -> None:
    outputs = Outputs(torch.zeros(2, 5), {"@stages": torch.zeros(2, 3, 4, 4)})
    probe = Probe(nn.Identity(), outputs)
    with pytest.raises(ValueError, match=r"reads maps of logits \(B, K, H, W\), but the student returns \(2, 5\); use"):
        kind().build(probe, probe)


@pytest.mark.parametrize("kind", [CWD, MasKD])
def test_only_without_layers_the_classes_must_agree(kind: type[DistillLoss]) -> None:
    assert kind().reads_logits
    assert not kind(["a"], ["a"]).reads_logits


@pytest.mark.parametrize(("size", "regions"), [((8, 6), (2, 2)), ((9, 7), (3, 3)), ((1, 1), (1, 1))])
def test_regions_of_skds(size: tuple[int, int], regions: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, 2, 4, *size)
    windows = [max(number // 2, 1) for number in size]
    pooled = [F.max_pool2d(feature, windows, windows, ceil_mode=True) for feature in (student, teacher)]
    assert pooled[0].shape[2:] == regions
    assert torch.equal(_value(SKDS(["a"], ["a"]), student, teacher), KF.skds_loss(*pooled))


def test_pixels_without_a_label_count_as_equal_in_ifvd() -> None:
    student, teacher = torch.randn(2, 2, 4, 6, 6)
    target = torch.randint(3, (2, 6, 6)).index_fill(1, torch.tensor([1, 4]), IGNORE_INDEX)
    criterion = IFVD(["a"], ["a"])
    found = _value(criterion, student, teacher, target)
    assert torch.equal(found, _value(criterion, student.index_fill(2, torch.tensor([1, 4]), 9.0), teacher, target))
    rows = torch.tensor([0, 2, 3, 5])
    parts = (values.index_select(2, rows) for values in (student, teacher))
    torch.testing.assert_close(found, _value(criterion, *parts, target.index_select(1, rows)) * 4 / 6)


def test_ifvd_in_a_loop() -> None:
    """Masks of another size, and centers of each image alone."""
    student, teacher, target = torch.randn(2, 3, 3, 3), torch.randn(2, 5, 3, 3), torch.randint(3, (2, 6, 9))
    small = target[:, ::2, ::3]

    def similarities(feature: Tensor) -> Tensor:
        found = torch.zeros(2, 3, 3)
        for image in range(2):
            for number in small[image].unique().tolist():
                pixels = feature[image][:, small[image] == number]
                center = pixels.mean(1, keepdim=True)
                found[image][small[image] == number] = F.cosine_similarity(pixels, center, dim=0)
        return found

    expected = (similarities(student) - similarities(teacher)).square().mean()
    torch.testing.assert_close(_value(IFVD(["a"], ["a"]), student, teacher, target), expected)


def test_tokens_learn_from_the_overlap_alone() -> None:
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


def test_learned_tokens_overlap_less() -> None:
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


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan")])
def test_invalid_regions(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"pool_scale must be greater than 0 and at most 1, or None, got {scale}"):
        SKDS(pool_scale=scale)


def test_invalid_numbers() -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
        MasKD(num_tokens=1)
    with pytest.raises(ValueError, match="dsd_pixel_loss compares pairs of layers and requires at least two, got 1"):
        KF.dsd_pixel_loss([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)])
    with pytest.raises(ValueError, match="no layers are set"):
        DSD([], [])(_features(torch.ones(1, 2, 3, 3)), _features(torch.ones(1, 2, 3, 3)), Batch(None, None))
