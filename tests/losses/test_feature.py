"""Criteria over features against loops over their definitions, and what only some of them promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import AT, KTA, MGD, NST, PAD, SRD, VID, DistillLoss, FitNet

BATCH = Batch(None, torch.zeros(4, dtype=torch.int64))


def _features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _answers(student: Tensor, teacher: Tensor) -> tuple[Outputs, Outputs]:
    logits = torch.zeros(len(student), 5)
    return Outputs(logits, {"a": student}), Outputs(logits, {"c": teacher})


def _built(criterion: DistillLoss, student: Outputs, teacher: Outputs) -> DistillLoss:
    criterion.build(Probe(torch.nn.Identity(), student), Probe(torch.nn.Identity(), teacher))
    return criterion.double()


@pytest.mark.parametrize(("channels", "others", "size"), [(5, 3, 4), (5, 3, 2), (3, 5, 2), (20, 30, 4)])
def test_nst_by_a_loop(channels: int, others: int, size: int) -> None:
    """With more pixels than channels, and with fewer, which is computed otherwise."""
    student, teacher = _features(2, channels, size, size), _features(2, others, size, size, seed=1)
    total = 0.0
    for own, other in zip(student.flatten(2), teacher.flatten(2), strict=True):
        own, other = ([row / row.norm() for row in rows] for rows in (own, other))
        for factor, left, right in ((1, own, own), (1, other, other), (-2, own, other)):
            kernel = [torch.dot(a, b).item() ** 2 for a in left for b in right]
            total += factor * sum(kernel) / len(kernel)
    assert KF.nst_loss(student, teacher).item() == pytest.approx(total / 2, rel=1e-12)


def test_nst_does_not_see_the_channels_order_and_size() -> None:
    student, teacher = _features(2, 6, 4, 4), _features(2, 6, 4, 4, seed=1)
    scaled = student[:, torch.randperm(6)] * torch.rand(2, 6, 1, 1).add(0.1)
    torch.testing.assert_close(KF.nst_loss(scaled, teacher), KF.nst_loss(student, teacher))


def test_affinity_by_outer_products() -> None:
    """Also where channels are dead: in one network, and in both."""
    student, teacher = _features(2, 5, 3, 4), _features(2, 5, 3, 4, seed=1)
    student[0, 1] = teacher[1, 2] = 0
    student[0, 3] = teacher[0, 3] = 0
    student[1, 4] = teacher[1, 4]
    student.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(student.flatten(0, 1).flatten(1), teacher.flatten(0, 1).flatten(1), strict=True):
        a, b = (F.normalize(row, dim=0) for row in (own, other))
        total = total + torch.linalg.matrix_norm(torch.outer(a, a) - torch.outer(b, b)) / 12
    loss = KF.affinity_loss(student, teacher)
    torch.testing.assert_close(loss, total / 2, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, student)[0] for value in (loss, total / 2)]
    assert grads[0].isfinite().all()
    alive = (student != 0) & (student != teacher)  # elsewhere it has an edge
    torch.testing.assert_close(grads[0][alive], grads[1][alive], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_kta_by_a_loop(p: float) -> None:
    student, teacher = _features(3, 2, 2, 2), _features(3, 2, 2, 2, seed=1)
    total = 0.0
    for own, other in zip(student.flatten(1), teacher.flatten(1), strict=True):
        difference = own / own.norm(3) - other / other.norm(3)
        total += difference.abs().mean() if p == 1 else difference.norm(p)
    torch.testing.assert_close(KF.kta_loss(student, teacher, p=p, q=3.0), total / 3)


@pytest.mark.parametrize("size", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_pad_at_extreme_variances(size: float) -> None:
    log_variance = torch.full((2, 3), size, requires_grad=True)
    student, teacher = torch.full((2, 3), 2.0, requires_grad=True), torch.zeros(2, 3)
    loss = KF.pad_loss(student, teacher, log_variance)
    loss.backward()
    bounded = math.exp(min(size, 80.0))
    assert loss.item() == pytest.approx(4 / (bounded + 1e-6) + size, rel=1e-5)
    assert log_variance.grad.isfinite().all()
    assert student.grad.isfinite().all()


def test_pad_projects_only_where_sizes_differ() -> None:
    sizes = {}
    for size in (6, 8):
        student, teacher = _answers(_features(4, 6), _features(4, size))
        criterion = _built(PAD(["a"], ["c"]), student, teacher)
        sizes[size] = sorted(name for name, _ in criterion.named_parameters())
    head = ["log_variances.0.0.weight", "log_variances.0.1.bias", "log_variances.0.1.weight"]
    assert sizes == {6: head, 8: [*head, "projectors.0.bias", "projectors.0.weight"]}


def test_vid_s_variance_starts_as_told_and_finds_the_error() -> None:
    """The variance that minimises the loss is the mean squared error of the channel."""
    student, teacher = _answers(torch.zeros(64, 3, 4, 4).double(), 3 * _features(64, 2, 4, 4))
    criterion = _built(VID(["a"], ["c"], initial_variance=2.0), student, teacher)
    raw = criterion.raw_variances[0]
    torch.testing.assert_close(F.softplus(raw) + 1e-5, torch.full((2,), 2.0, dtype=torch.float64))
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.3)
    for _ in range(600):
        optimizer.zero_grad()
        criterion(student, teacher, BATCH).backward()
        optimizer.step()
    errors = teacher.features["c"].square().mean((0, 2, 3))
    torch.testing.assert_close((F.softplus(raw) + 1e-5).detach(), errors, rtol=1e-3, atol=0)


def test_vid_s_variance_may_start_large() -> None:
    """The inverse of softplus by exp alone overflows from 710 on."""
    criterion = _built(VID(["a"], ["c"], initial_variance=1e4), *_answers(_features(2, 3, 4, 4), _features(2, 2, 4, 4)))
    torch.testing.assert_close(F.softplus(criterion.raw_variances[0]) + 1e-5, torch.full((2,), 1e4).double())


def test_srd_normalises_both_features() -> None:
    """Neither network's scale and shift of a feature counts."""
    values = []
    for scale, shift in ((1.0, 0.0), (7.0, 3.0)):
        torch.manual_seed(0)
        student, teacher = _answers(scale * _features(8, 6) + shift, scale * _features(8, 5, seed=1) + shift)
        criterion = _built(SRD(["a"], ["c"]), student, teacher)
        values.append(criterion(student, teacher, BATCH)["features"])
    torch.testing.assert_close(*values, rtol=1e-3, atol=0)


def test_mgd_masks_whole_channels_anew_each_step() -> None:
    student, teacher = _answers(_features(64, 20, 2, 2), _features(64, 20, 2, 2, seed=1))
    criterion = _built(MGD(["a"], ["c"], mask_ratio=0.25), student, teacher)
    seen: list[Tensor] = []
    criterion.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(2):
        criterion(student, teacher, BATCH)
    masked = [(feature == 0).flatten(2) for feature in seen]
    assert all(torch.equal(mask.any(2), mask.all(2)) for mask in masked)
    assert masked[0].double().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not torch.equal(*masked)


def test_mgd_masks_whole_pixels() -> None:
    student, teacher = _answers(_features(8, 5, 20, 20), _features(8, 5, 20, 20, seed=1))
    criterion = _built(MGD(["a"], ["c"], mask_ratio=0.65, mask="pixels"), student, teacher)
    seen: list[Tensor] = []
    criterion.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    criterion(student, teacher, BATCH)
    masked = seen[0] == 0
    assert torch.equal(masked.any(1), masked.all(1))
    assert masked.double().mean().item() == pytest.approx(0.65, abs=0.03)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: VID(initial_variance=1e-6),
            r"VID requires 0 < eps < initial_variance < inf, got eps 1e-05 and .* 1e-06",
        ),
        (lambda: PAD(eps=0.0), "eps must be greater than 0, got 0.0"),
        (lambda: SRD(exponent=0.5), "exponent must be at least 1, got 0.5"),
        (lambda: SRD(temperature=0.0), "temperature must be greater than 0, got 0.0"),
        (lambda: MGD(mask_ratio=1.0), "mask_ratio must be at least 0 and less than 1, got 1.0"),
        (lambda: MGD(mask="rows"), "mask must be 'channels' or 'pixels', got 'rows'"),
        (lambda: FitNet(regressor="linear"), "regressor must be 'conv_bn_relu' or 'conv', got 'linear'"),
        (lambda: KTA(q=0.0), "q must be at least 1, got 0.0"),
        (lambda: KTA(affinity_weight=-1.0), "affinity_weight must not be negative, got -1.0"),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], DistillLoss], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("kind", [AT, FitNet, NST, VID, MGD, KTA, PAD, SRD])
def test_layers_of_another_form(kind: Callable[..., DistillLoss]) -> None:
    form = _features(4, 6, 2) if kind in (PAD, SRD) else _features(4, 6)
    with pytest.raises(ValueError, match=rf"{kind.__name__} reads .*, but the student layer returns .*; use another"):
        _built(kind(["a"], ["c"]), *_answers(form, form))


def test_tensors_by_name_are_widened() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 8, 4, 4, generator=generator).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        named = KF.nst_loss(student_feature=ours, teacher_feature=theirs)
        mixed = KF.nst_loss(ours, teacher_feature=theirs)
    assert named.dtype == mixed.dtype == torch.float32
    assert torch.equal(named, KF.nst_loss(ours, theirs))
    assert torch.equal(mixed, named)
