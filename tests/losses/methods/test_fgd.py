"""FGD: focal and global distillation for detectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lkd import Batch
from lkd import functional as KF
from lkd.losses import FGD
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, outputs


class _Boxed(FGD):
    """FGD with two boxes per image, chosen by the image's index: inside, partly outside or covering the image."""

    BOXES = (
        [[4.0, 4.0, 20.0, 12.0], [8.0, 2.0, 16.0, 30.0]],
        [[-3.0, -3.0, 40.0, 33.0], [1.0, 1.0, 2.0, 2.0]],
        [[30.0, 10.0, 32.0, 11.5], [50.0, 50.0, 60.0, 60.0]],
        [[50.0, 50.0, 60.0, 60.0], [50.0, 50.0, 60.0, 60.0]],
    )

    def boxes(self, batch: Batch) -> tuple[list[Tensor], tuple[int, int]]:
        return list(torch.tensor(self.BOXES)[batch.index % 4]), (32, 32)


BATCH = Batch(None, torch.zeros(2, dtype=torch.int64))

CASES = {
    "FGD": FeatureCase(
        lambda: FGD(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (5, 6, 4)},
        batch_mean=True,
    ),
    "FGD-boxes": FeatureCase(
        lambda: _Boxed(*LAYERS, temperature=0.8),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (5, 6, 4)},
        batch_mean=True,
    ),
}


def _fgd(inputs: Values, hyper: Hyper) -> Values:
    """The bias before the softmax is omitted because it has no effect."""
    named = parity.named(inputs)
    parts = {"align": "aligners.0"}
    for network in ("student", "teacher"):
        parts |= {f"channel_add_conv_{network[0]}": f"{network}_blocks.0.transform"}
    given = parity.parameters(inputs, **parts)
    for network in ("student", "teacher"):
        given[f"{network}_blocks.0.scores.weight"] = inputs[f"params.conv_mask_{network[0]}.weight"]
    height, width = (int(size) for size in hyper["image_size"])
    images = [torch.zeros(3, height, width)] * len(inputs["student"])
    boxes = [{"boxes": inputs[f"boxes.{number}"]} for number in range(len(images))]
    weights = {"foreground": "alpha", "background": "beta", "attention": "gamma", "relation": "lambda"}

    def found(**weights: float) -> Values:
        criterion = FGD(*parity.layers(named), **weights, temperature=hyper["temperature"])
        return parity.terms(parity.built(criterion, named), named, batch=Batch(images, boxes), **given)

    published = found(**{f"{name}_weight": hyper[key] for name, key in weights.items()})
    return {**found(**{f"{name}_weight": 1.0 for name in weights}), "loss": published["loss"]}


PARITY = {"fgd": _fgd}


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


def test_fgd_box_covers_the_whole_image() -> None:
    foreground, background = KF.fgd_masks([torch.tensor([[0.0, 0.0, 32.0, 16.0]])], [(16, 32)], (4, 8))
    assert torch.equal(foreground, torch.full((1, 4, 8), 1 / 45))
    assert not background.any()


def test_fgd_places_boxes_in_the_padded_batch() -> None:
    """Smaller images of a batch are padded at the right and at the bottom to the largest height and width."""
    student, teacher = draw(2, 4, 4, 6), draw(2, 4, 4, 6, seed=1)
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.zeros(0, 4)]
    target = [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in boxes]
    batch = Batch([torch.zeros(3, 20, 48), torch.zeros(3, 32, 24)], target)
    criterion = built(FGD(["a"], ["c"], 1.0, 1.0, 1.0, 1.0, temperature=2.0), outputs(a=student), outputs(c=teacher))
    found = criterion(outputs(a=student), outputs(c=teacher), batch)
    foreground, background = KF.fgd_masks(boxes, [(32, 48), (32, 48)], (4, 6))
    assert (foreground[0] > 0).sum() == 9
    assert torch.equal(found["foreground"], KF.fgd_feature_loss(student, teacher, foreground, 2.0))
    assert torch.equal(found["background"], KF.fgd_feature_loss(student, teacher, background, 2.0))
    stacked = batch._replace(input=torch.zeros(2, 3, 32, 48))
    assert torch.equal(criterion(outputs(a=student), outputs(c=teacher), stacked)["foreground"], found["foreground"])


def test_fgd_without_boxes() -> None:
    """Batches of class labels, of masks, and of images without objects have no foreground."""
    student, teacher = outputs(a=draw(2, 4, 4, 6)), outputs(c=draw(2, 4, 4, 6, seed=1))
    criterion = built(FGD(["a"], ["c"]), student, teacher)
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


def test_blocks_are_initialized_as_the_identity() -> None:
    student, teacher = outputs(a=draw(2, 4, 4, 6)), outputs(c=draw(2, 4, 4, 6, seed=1))
    distance = (teacher.features["c"] - student.features["a"]).square().sum()
    criterion = built(FGD(["a"], ["c"], relation_weight=1.0), student, teacher)
    torch.testing.assert_close(criterion(student, teacher, BATCH)["relation"], distance / 2)


def test_invalid_layers() -> None:
    student, teacher = outputs(a=draw(2, 8, 4, 4)), outputs(p=draw(2, 6))
    with pytest.raises(ValueError, match=r"FGD reads feature maps .*, but the teacher layer returns \(2, 6\)"):
        built(FGD(["a"], ["p"]), student, teacher)
