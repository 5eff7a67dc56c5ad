"""Criteria of dense prediction: the logits are maps, and the target is a mask of classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lkd import Batch, Outputs
from lkd.losses import CIRKD, CWD, DIST, DSD, IFVD, KD, SKDS, CIRKDChannel, MasKD, PerPixel
from lkd.types import IGNORE_INDEX
from tests.losses.cases.base import SAMPLES, FeatureCase


@dataclass(frozen=True)
class SegmentationCase(FeatureCase):
    """A criterion that reads maps of logits, or masks.

    Attributes:
        logits: Rows and columns of both networks' logits.
        teacher_logits: The same for the teacher, where it differs.
        mask: Rows and columns of the masks. One row in four has no label.
    """

    logits: tuple[int, int] = (4, 6)
    teacher_logits: tuple[int, int] | None = None
    mask: tuple[int, int] = (8, 12)

    def of(self, classes: int, shrink: int) -> FeatureCase:
        """Return this case with another number of classes, and with its maps and masks reduced by a factor."""

        def smaller(size: tuple[int, int]) -> tuple[int, int]:
            return max(size[0] // shrink, 1), max(size[1] // shrink, 1)

        case = super().of(classes, shrink)
        other = self.teacher_logits and smaller(self.teacher_logits)
        return replace(case, logits=smaller(self.logits), teacher_logits=other, mask=smaller(self.mask))

    def answers(self, samples: int = SAMPLES, size: float = 1.0, seed: int = 0) -> tuple[Outputs, Outputs]:
        """What student and teacher say of a batch of that many images; features as behind a ReLU."""
        both = super().answers(samples, size, seed)
        generator = torch.Generator().manual_seed(seed + 1)

        def logits(rows: int, columns: int) -> Tensor:
            return 3 * size * torch.randn(samples, self.classes, rows, columns, generator=generator)

        student, teacher = (
            outputs._replace(logits=logits(*(own or self.logits)))
            for outputs, own in zip(both, (self.logits, self.teacher_logits), strict=True)
        )
        return student, teacher

    def batch(self, samples: int = SAMPLES) -> Batch:
        """The masks and the positions of that many images."""
        rows, columns = self.mask
        place = torch.arange(rows).view(-1, 1) // 2 + torch.arange(columns) // 3
        target = (place + torch.arange(samples).view(-1, 1, 1)) % self.classes
        target[:, 3::4] = IGNORE_INDEX
        return Batch(None, target, torch.arange(samples))


LAYERS = (["a", "b"], ["c", "d"])
STUDENT = {"a": (4, 8, 8), "b": (6, 4, 6)}
EQUAL = {"c": (4, 8, 8), "d": (6, 4, 6)}
OTHER = {"c": (5, 8, 4), "d": (7, 6, 8)}


def _cirkd(**settings: float) -> CIRKD:
    return CIRKD("a", "c", memory_size=(30, 12), num_keys=(20, 10), pixels_per_image=3, **settings)


CASES: dict[str, FeatureCase] = {
    "CIRKD": SegmentationCase(
        _cirkd,
        student={"a": (4, 4, 6)},
        teacher={"c": (6, 4, 6)},
        memories=("region_memory", "region_pointer", "pixel_pointer"),
        reads_target=True,
    ),
    "CIRKD-batch": SegmentationCase(
        lambda: CIRKD("a", "c", pixel_weight=0.0, region_weight=0.0, pool_size=2),
        student={"a": (4, 7, 6)},
        teacher={"c": (4, 7, 6)},
        zero_at_equality=True,
    ),
    "CIRKD-sizes": SegmentationCase(
        lambda: _cirkd(batch_weight=0.5, pixel_weight=0.0, kd_temperature=2.0),
        student={"a": (4, 4, 6)},
        teacher={"c": (6, 8, 4)},
        memories=("region_memory", "region_pointer"),
        reads_target=True,
    ),
    "CIRKDChannel": SegmentationCase(
        lambda: CIRKDChannel("a", "c", memory_size=60, num_keys=20, channels_per_step=12),
        student={"a": (4, 8, 8)},
        teacher={"c": (5, 8, 8)},
    ),
    "CIRKDChannel-sizes": SegmentationCase(
        lambda: CIRKDChannel("a", "c", memory_size=60, num_keys=20, channels_per_step=12, pool_size=2),
        student={"a": (4, 7, 8)},
        teacher={"c": (5, 4, 10)},
    ),
    "CWD": SegmentationCase(CWD, zero_at_equality=True, batch_mean=True),
    "CWD-features": SegmentationCase(
        lambda: CWD(*LAYERS, temperature=1.0),
        student={"a": (4, 4, 6), "b": (6, 4, 4)},
        teacher={"c": (4, 4, 6), "d": (7, 8, 4)},
        batch_mean=True,
    ),
    "CWD-sizes": SegmentationCase(CWD, teacher_logits=(6, 4), zero_at_equality=True, batch_mean=True),
    "DSD": SegmentationCase(
        lambda: DSD(*LAYERS),
        student={"a": (4, 4, 6), "b": (6, 4, 6)},
        teacher={"c": (4, 4, 6), "d": (6, 4, 6)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "DSD-sizes": SegmentationCase(
        lambda: DSD(*LAYERS), student=STUDENT, teacher=OTHER, teacher_logits=(5, 7), batch_mean=True
    ),
    "IFVD": SegmentationCase(
        lambda: IFVD(*LAYERS),
        student=STUDENT,
        teacher=EQUAL,
        zero_at_equality=True,
        batch_mean=True,
        reads_target=True,
    ),
    "IFVD-sizes": SegmentationCase(
        lambda: IFVD(*LAYERS), student=STUDENT, teacher=OTHER, batch_mean=True, reads_target=True
    ),
    "MasKD": SegmentationCase(MasKD, batch_mean=True),
    "MasKD-features": SegmentationCase(
        lambda: MasKD(*LAYERS, num_tokens=3), student=STUDENT, teacher=OTHER, batch_mean=True
    ),
    "MasKD-frozen": SegmentationCase(
        lambda: MasKD(learn_tokens=False), teacher_logits=(8, 4), zero_at_equality=True, batch_mean=True
    ),
    "PerPixel": SegmentationCase(
        lambda: PerPixel(KD(2.0)),
        teacher_logits=(6, 4),
        mask=(7, 8),
        zero_at_equality=True,
        batch_mean=True,
        reads_target=True,
    ),
    "PerPixel-pairs": SegmentationCase(
        lambda: PerPixel(DIST(), max_pixels=40), mask=(7, 8), zero_at_equality=True, reads_target=True
    ),
    "SKDS": SegmentationCase(
        lambda: SKDS(*LAYERS), student=STUDENT, teacher=EQUAL, zero_at_equality=True, batch_mean=True
    ),
    "SKDS-pixels": SegmentationCase(
        lambda: SKDS(*LAYERS, pool_scale=None), student=STUDENT, teacher=OTHER, batch_mean=True
    ),
}
