"""Criteria of detectors' features and heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkd import Batch
from lkd.losses import FBKD, FGD, LD, PKD, CrossKD
from tests.losses.cases.base import FeatureCase

LAYERS = (["a", "b"], ["c", "d"])


class _Boxed(FGD):
    """Each image has two boxes, in or outside of the image, or around it, by its position in the data set."""

    BOXES = (
        [[4.0, 4.0, 20.0, 12.0], [8.0, 2.0, 16.0, 30.0]],
        [[-3.0, -3.0, 40.0, 33.0], [1.0, 1.0, 2.0, 2.0]],
        [[30.0, 10.0, 32.0, 11.5], [50.0, 50.0, 60.0, 60.0]],
        [[50.0, 50.0, 60.0, 60.0], [50.0, 50.0, 60.0, 60.0]],
    )

    def boxes(self, batch: Batch) -> tuple[list[Tensor], tuple[int, int]]:
        return list(torch.tensor(self.BOXES)[batch.index % 4]), (32, 32)


def _heads() -> nn.Module:
    """A detector's heads: one for classes, one for boxes."""
    network = nn.Module()
    network.norm = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    network.classes = nn.Sequential(network.norm, nn.Conv2d(6, 3, 1)).eval()
    network.boxes = nn.Conv2d(5, 4 * 4, 3, padding=1)
    return network


CASES = {
    "CrossKD": FeatureCase(
        lambda: CrossKD(*LAYERS, "classes", teacher_box_head="boxes"),
        student={"a": (5, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (5, 6, 4)},
        teacher_network=_heads,
    ),
    "CrossKD-branches": FeatureCase(
        lambda: CrossKD(["a"], ["c"], "classes", ["b"], ["d"], "boxes", beta=2.0, temperature=2.0),
        student={"a": (5, 8, 8), "b": (5, 8, 8)},
        teacher={"c": (5, 8, 8), "d": (5, 8, 8)},
        teacher_network=_heads,
    ),
    "CrossKD-classes": FeatureCase(
        lambda: CrossKD(["a"], ["c"], "classes"),
        student={"a": (4, 8, 8)},
        teacher={"c": (5, 8, 8)},
        teacher_network=_heads,
    ),
    "FBKD": FeatureCase(
        lambda: FBKD(*LAYERS, feature_weight=1e-3, nonlocal_weight=1e-3, reduction=[4, 2], pool=[4, 1]),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (5, 6, 4)},
    ),
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
    "LD": FeatureCase(
        lambda: LD(["a", "b"], ["c", "d"], ["p", "q"]),
        student={"a": (4 * 3, 8, 8), "b": (4 * 5, 4, 4), "p": (3, 8, 8), "q": (3, 4, 4)},
        teacher={"c": (4 * 3, 8, 8), "d": (4 * 5, 4, 4)},
        batch_mean=True,
    ),
    "LD-sizes": FeatureCase(
        lambda: LD(["a"], ["c"], ["p"], temperature=1.0, avg_factor=16.0),
        student={"a": (4 * 3, 4, 8), "p": (3, 2, 2)},
        teacher={"c": (4 * 3, 8, 6)},
        batch_mean=True,
    ),
    "PKD": FeatureCase(
        lambda: PKD(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
    ),
    "PKD-sizes": FeatureCase(
        lambda: PKD(*LAYERS, resize_student=False),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 8), "d": (6, 8, 6)},
    ),
}
