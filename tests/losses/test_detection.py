"""Criteria of detectors against loops over their definitions, and what only some of them promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import FBKD, FGD, LD, PKD, CrossKD, DistillLoss
from lkd.losses.fbkd import _NonLocal

BATCH = Batch(None, torch.zeros(2, dtype=torch.int64))


def _features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _outputs(logits: Tensor | None = None, **features: Tensor) -> Outputs:
    return Outputs(torch.zeros(2, 3) if logits is None else logits, features)


def _built(criterion: DistillLoss, student: Outputs, teacher: Outputs, network: nn.Module | None = None) -> DistillLoss:
    criterion.build(Probe(nn.Identity(), student), Probe(network or nn.Identity(), teacher))
    return criterion.double()


def test_pkd_is_one_minus_the_correlation() -> None:
    student, teacher = _features(3, 5, 4, 4), _features(3, 5, 4, 4, seed=1)
    rows = (feature.transpose(0, 1).flatten(1) for feature in (student, teacher))
    found = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)]
    expected = 47 / 48 * (1 - torch.stack(found).mean())
    torch.testing.assert_close(KF.pkd_loss(student, teacher), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(KF.pkd_loss(3 * student + 1, teacher / 7), expected, rtol=1e-5, atol=0)


def test_pkd_compares_logits_without_layers() -> None:
    student, teacher = _features(2, 3, 4, 4), _features(2, 3, 8, 8, seed=1)
    criterion = _built(PKD((), ()), _outputs(student), _outputs(teacher))
    expected = KF.pkd_loss(F.interpolate(student, (8, 8), mode="bilinear"), teacher)
    assert torch.equal(criterion(_outputs(student), _outputs(teacher), BATCH), expected)


def _masks_by_a_loop(
    boxes: Tensor, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[list[list[float]], list[list[float]]]:
    foreground = [[0.0] * size[1] for _ in range(size[0])]
    for x1, y1, x2, y2 in boxes.tolist():
        left, right = math.floor(x1 / image_size[1] * size[1]), math.ceil(x2 / image_size[1] * size[1])
        top, bottom = math.floor(y1 / image_size[0] * size[0]), math.ceil(y2 / image_size[0] * size[0])
        for row in range(max(top, 0), min(bottom + 1, size[0])):
            for column in range(max(left, 0), min(right + 1, size[1])):
                density = 1 / ((right + 1 - left) * (bottom + 1 - top))
                foreground[row][column] = max(foreground[row][column], density)
    empty = sum(value == 0 for row in foreground for value in row)
    return foreground, [[1 / empty if value == 0 else 0.0 for value in row] for row in foreground]


def test_fgd_masks_by_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 4, 2, 2, generator=generator, dtype=torch.float64).sort(2).values
    boxes = [*(corners * torch.tensor([50.0, 70.0])).flatten(2), torch.zeros(0, 4, dtype=torch.float64)]
    boxes[1] = boxes[1][:1]
    sizes = [(70, 50), (71, 55), (70, 80), (30, 30)]
    foreground, background = KF.fgd_masks(boxes, sizes, (9, 7))
    for number, (own, size) in enumerate(zip(boxes, sizes, strict=True)):
        expected = _masks_by_a_loop(own, size, (9, 7))
        torch.testing.assert_close(foreground[number], torch.tensor(expected[0], dtype=torch.float64))
        torch.testing.assert_close(background[number], torch.tensor(expected[1], dtype=torch.float64))
    assert not foreground[3].any()
    assert torch.equal(background[3], torch.full((9, 7), 1 / 63, dtype=torch.float64))


def test_fgd_where_a_box_is_the_whole_image() -> None:
    foreground, background = KF.fgd_masks([torch.tensor([[0.0, 0.0, 32.0, 16.0]])], [(16, 32)], (4, 8))
    assert torch.equal(foreground, torch.full((1, 4, 8), 1 / 45))
    assert not background.any()


def test_fgd_places_boxes_in_the_padded_batch() -> None:
    """Images of a batch lie at the top left of an area as large as the largest height and width."""
    student, teacher = _features(2, 4, 4, 6), _features(2, 4, 4, 6, seed=1)
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.zeros(0, 4)]
    target = [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in boxes]
    batch = Batch([torch.zeros(3, 20, 48), torch.zeros(3, 32, 24)], target)
    criterion = _built(FGD(["a"], ["c"], 1.0, 1.0, 1.0, 1.0, temperature=2.0), _outputs(a=student), _outputs(c=teacher))
    found = criterion(_outputs(a=student), _outputs(c=teacher), batch)
    foreground, background = KF.fgd_masks(boxes, [(32, 48), (32, 48)], (4, 6))
    assert (foreground[0] > 0).sum() == 9
    assert torch.equal(found["foreground"], KF.fgd_feature_loss(student, teacher, foreground, 2.0))
    assert torch.equal(found["background"], KF.fgd_feature_loss(student, teacher, background, 2.0))
    stacked = batch._replace(input=torch.zeros(2, 3, 32, 48))
    assert torch.equal(criterion(_outputs(a=student), _outputs(c=teacher), stacked)["foreground"], found["foreground"])


def test_fgd_without_boxes() -> None:
    """Batches of classes, of masks, and of images in which nothing is found."""
    student, teacher = _outputs(a=_features(2, 4, 4, 6)), _outputs(c=_features(2, 4, 4, 6, seed=1))
    criterion = _built(FGD(["a"], ["c"]), student, teacher)
    nothing = [{"boxes": torch.zeros(0, 4)}, {"boxes": torch.zeros(0, 4)}]
    batches = [
        BATCH,
        Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32)),
        Batch([torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)], nothing),
    ]
    values = [criterion(student, teacher, batch) for batch in batches]
    for found in values[1:]:
        torch.testing.assert_close(found, values[0], rtol=1e-6, atol=0)  # boxes are in single precision
    assert values[0]["foreground"] == 0
    assert values[0]["background"] > 0


def test_blocks_start_as_the_identity() -> None:
    student, teacher = _outputs(a=_features(2, 4, 4, 6)), _outputs(c=_features(2, 4, 4, 6, seed=1))
    distance = (teacher.features["c"] - student.features["a"]).square().sum()
    fgd = _built(FGD(["a"], ["c"], relation_weight=1.0), student, teacher)
    torch.testing.assert_close(fgd(student, teacher, BATCH)["relation"], distance / 2)
    block = _NonLocal(4, 2, 2).double()
    assert torch.equal(block(student.features["a"]), student.features["a"])


@pytest.mark.parametrize(("size", "pool"), [(1.0, 2), (1e3, 1), (1e-3, 8)])
def test_non_local_block_by_the_formula(size: float, pool: int) -> None:
    """Also where the products are large: they are scaled before the normalization."""
    torch.manual_seed(0)
    block = _NonLocal(4, 2, pool).double()
    nn.init.normal_(block.gain)
    feature = size * _features(2, 4, 6, 4)
    phi, values = (F.max_pool2d(part(feature), (min(pool, 6), min(pool, 4))) for part in (block.phi, block.values))
    theta, phi, values = (part.flatten(2) for part in (block.theta(feature), phi, values))
    mixed = torch.einsum("bcp,bcq,bdq->bdp", theta, phi, values) / phi.shape[2]
    normalized = F.batch_norm(block.out(mixed.view(2, 2, 6, 4)), None, None, block.gain, block.bias, training=True)
    torch.testing.assert_close(block(feature), feature + normalized)


def test_fbkd_settings_of_each_layer() -> None:
    student, teacher = _outputs(a=_features(2, 4, 4, 6), b=_features(2, 8, 2, 3)), _outputs(c=_features(2, 8, 4, 6))
    pair = _outputs(c=_features(2, 8, 4, 6), d=_features(2, 4, 2, 3))
    criterion = _built(FBKD(["a", "b"], ["c", "d"], reduction=[4, 2], pool=3), student, pair)
    blocks = [block for level in criterion.levels for block in (level.student_block, level.teacher_block)]
    assert [block.theta.out_channels for block in blocks] == [1, 2, 4, 2]
    assert [block.pool for block in blocks] == [3] * 4
    with pytest.raises(ValueError, match="FBKD compares 1 layers but has 2 values of pool; set one for each"):
        _built(FBKD(["a"], ["c"], pool=[1, 2]), student, teacher)


def test_ld_by_a_loop() -> None:
    """Every position counts by the student's largest class probability; the classes are the logits."""
    student, teacher, scores = (_features(2, channels, 3, 2, seed=channels) for channels in (12, 12, 5))
    teacher = teacher.flip(0) * 2
    expected = 0.0
    for image in range(2):
        for row in range(3):
            for column in range(2):
                ours, theirs = (values[image, :, row, column].view(4, 3) / 2 for values in (student, teacher))
                weight = scores[image, :, row, column].max().sigmoid()
                difference = theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))
                expected += float(weight * 4 * difference.sum() / 3 / 4 / 2)
    given = _outputs(scores, a=student), _outputs(c=teacher)
    found = _built(LD(["a"], ["c"], temperature=2.0), *given)(*given, BATCH)
    assert found.item() == pytest.approx(expected, rel=1e-12)


class _Detector(nn.Module):
    """A teacher with heads."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.boxes = nn.Conv2d(5, 8, 1)
        self.tokens = nn.Flatten()
        self.three = nn.Conv2d(5, 3, 1)


def test_crosskd_is_made_of_its_functions() -> None:
    """The heads of the teacher see both features, and get no gradient, even if they would take one."""
    torch.manual_seed(0)
    teacher = _Detector().double().eval()
    ours, theirs = (_features(2, 5, 4, 3, seed=seed) for seed in (0, 1))
    given = _outputs(a=ours.requires_grad_()), _outputs(c=theirs)
    criterion = _built(CrossKD(["a"], ["c"], "classes", teacher_box_head="boxes", temperature=2.0), *given, teacher)
    found = criterion(*given, BATCH)
    aligned = KF.crosskd_aligned(ours, theirs)
    rows = [
        [head(feature).movedim(1, 3).flatten(0, 2) for feature in (aligned, theirs)]
        for head in (teacher.classes, teacher.boxes)
    ]
    quality = rows[0][1].amax(1).sigmoid()
    expected = KF.crosskd_class_loss(*rows[0], avg_factor=quality.sum())
    torch.testing.assert_close(found["class"], expected)
    torch.testing.assert_close(found["box"], 4 * KF.crosskd_box_loss(*rows[1], quality, 2.0))
    (found["class"] + found["box"]).backward()
    assert ours.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_crosskd_aligns_means_and_deviations() -> None:
    student, teacher = 5 * _features(3, 4, 2, 6) - 2, _features(3, 4, 5, 5, seed=1)
    found = torch.std_mean(KF.crosskd_aligned(student, teacher), dim=(0, 2, 3))
    torch.testing.assert_close(found, torch.std_mean(teacher, dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher_head": "class"}, "_Detector has no layer 'class'; set teacher_head of CrossKD"),
        ({"teacher_head": "classes.3"}, r"applies the teacher's layer 'classes.3' to features \(2, 5, 4, 4\), which"),
        ({"teacher_head": "tokens"}, "requires a teacher layer that returns a map .* but 'tokens' does not"),
        (
            {"teacher_head": "classes", "teacher_box_head": "three"},
            r"CrossKD compares distributions of boxes, 4 \* \(reg_max \+ 1\) channels .*, got 3 and 3; use the",
        ),
    ],
)
def test_heads_that_do_not_fit(settings: dict[str, str], says: str) -> None:
    student, teacher = _outputs(a=torch.rand(2, 5, 4, 4)), _outputs(c=torch.rand(2, 5, 4, 4))
    with pytest.raises(ValueError, match=says):
        CrossKD(["a"], ["c"], **settings).build(Probe(nn.Identity(), student), Probe(_Detector(), teacher))


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        (LD(), "the criterion reads features, but no layers are set"),
        (LD(["a"], ["c"], ["a", "b"]), "LD requires as many student_layers as teacher_layers, .* got 1 teacher_layers"),
        (LD(["a"], ["c"]), r"LD reads feature maps .*, but the class_score layer returns \(2, 3\)"),
        (LD(["a"], ["d"], ["b"]), r"LD compares distributions of boxes, .*, got 8 and 12; use the layers that"),
        (PKD(["a"], ["p"]), r"PKD reads feature maps .*, but the teacher layer returns \(2, 6\)"),
        (FGD(["a"], ["p"]), r"FGD reads feature maps .*, but the teacher layer returns \(2, 6\)"),
        (FBKD(["a"], ["p"]), r"FBKD reads feature maps .*, but the teacher layer returns \(2, 6\)"),
        (CrossKD(["a"], ["p"]), r"CrossKD reads feature maps .*, but the teacher layer returns \(2, 6\)"),
    ],
)
def test_layers_of_another_form(criterion: DistillLoss, says: str) -> None:
    student = _outputs(a=_features(2, 8, 4, 4), b=_features(2, 3, 4, 4))
    teacher = _outputs(c=_features(2, 8, 4, 4), d=_features(2, 12, 4, 4), p=_features(2, 6))
    with pytest.raises(ValueError, match=says):
        _built(criterion, student, teacher)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: CrossKD(beta=0.5), ValueError, "beta must be at least 1, got 0.5"),
        (
            lambda: CrossKD(student_box_layers=["b"], teacher_box_layers=["d"]),
            ValueError,
            "CrossKD requires a teacher_box_head and as many student_box_layers as student_layers, got None, 1 and 1",
        ),
        (
            lambda: CrossKD(student_box_layers="b"),
            TypeError,
            r"student_box_layers must be a list .*, got 'b'; use \['b'",
        ),
        (lambda: LD(["a"], ["c"], "b"), TypeError, r"class_layers must be a list of layer names, got 'b'; use \['b'\]"),
        (lambda: FBKD(pool=0), ValueError, "pool must be at least 1, got 0"),
        (lambda: FBKD(reduction=[2, 0]), ValueError, r"reduction must be at least 1, got \[2, 0\]"),
        (
            lambda: KF.pkd_loss(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)),
            ValueError,
            "pkd_loss requires at least 2 values in each channel, got 1; use larger maps",
        ),
        (
            lambda: KF.ld_loss(torch.ones(3, 6), torch.ones(3, 6), torch.ones(3)),
            ValueError,
            r"ld_loss expects student_boxes of shape \(N, 4 \* M\), got \(3, 6\)",
        ),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
