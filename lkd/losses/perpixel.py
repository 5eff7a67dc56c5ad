"""Logit criteria applied to the pixels of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses._dense import enlarged, logit_maps, resized_labels
from lkd.losses.base import DistillLoss, named_terms
from lkd.losses.composite import WrapperLoss
from lkd.types import IGNORE_INDEX, Batch, Outputs


class PerPixel(WrapperLoss):
    """A logit criterion applied to dense predictions: each pixel is a sample.

    Logits `(B, K, H, W)` become `(B * H * W, K)`. If the maps of student and teacher differ in size, the smaller one is
    interpolated to the size of the larger one (bilinear, `align_corners=False`); masks are resized by nearest neighbor.

    Pixels with the label `IGNORE_INDEX` are excluded, without synchronizing with the device:

    - Criteria that are a mean over samples average over the labelled pixels only.
    - Criteria that compare samples with each other, or have terms of both kinds, receive the labelled pixels in random
      order, repeated to fill the positions of the ignored pixels. If `max_pixels` does not exceed the number of
      labelled pixels, this is a random sample without replacement.

    Args:
        criterion: Criterion of logits, such as `KD`, `DKD`, `NKD` or `DIST`.
        max_pixels: Number of pixels that are sampled at random from the labelled pixels of the batch, for criteria that
            compare all pairs of samples. `None` uses all pixels.

    Raises:
        ValueError: If the criterion reads features, sample indices or several views, or `max_pixels` is less than 2.

    References:
        Liu et al.: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019 (arXiv 1903.04197), for KD.
        The authors' code and most others distill the ignored pixels as well.
    """

    def __init__(self, criterion: DistillLoss, max_pixels: int | None = None) -> None:
        super().__init__(criterion)
        self.check_reads_logits()
        name = type(criterion).__name__
        if criterion.needs_index or criterion.num_views > 1:
            raise ValueError(
                f"PerPixel cannot apply {name}, which reads sample indices or views; use another criterion"
            )
        if max_pixels is not None and max_pixels < 2:
            raise ValueError(f"max_pixels must be at least 2, or null for all pixels, got {max_pixels}")
        self.max_pixels = max_pixels

    @property
    def skips_unlabelled(self) -> bool:  # type: ignore[override]
        """Always True: ignored pixels are excluded."""
        return True

    def uniform(self, labelled: Tensor) -> Tensor:
        """Draw the random numbers that order the labelled pixels.

        Args:
            labelled: Which pixels have a label `(N,)`, bool.

        Returns:
            Uniform random numbers in [0, 1) `(N,)`.
        """
        return torch.rand(labelled.shape, device=labelled.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Apply the criterion to the labelled pixels."""
        if not self.criterion.needs_teacher:
            teacher = student._replace(logits=student.logits.detach())
        student_logits, teacher_logits = logit_maps(self, student, teacher)
        student_logits, teacher_logits = enlarged(student_logits, teacher_logits)
        target = resized_labels(batch.target, (student_logits.shape[2], student_logits.shape[3])).flatten()
        student_logits, teacher_logits = _rows(student_logits), _rows(teacher_logits)
        fills = self.criterion.compares_samples or self.criterion.skips_unlabelled is None
        if fills or self.max_pixels is not None:
            chosen = self._sample(target != IGNORE_INDEX)
            student_logits, teacher_logits, target = student_logits[chosen], teacher_logits[chosen], target[chosen]
        if fills or self.criterion.skips_unlabelled:
            has_labels = (target != IGNORE_INDEX).any()
            return {
                name: term * has_labels for name, term in self._terms(student_logits, teacher_logits, target).items()
            }
        return self._mean_over_labelled(student_logits, teacher_logits, target)

    def _sample(self, labelled: Tensor) -> Tensor:
        """Return the positions of labelled pixels in random order, repeated from the first one if there are too few."""
        order = (self.uniform(labelled) + 2 * ~labelled).argsort()  # labelled pixels first
        size = len(labelled) if self.max_pixels is None else min(self.max_pixels, len(labelled))
        return order[torch.arange(size, device=order.device) % labelled.sum().clamp(min=1)]

    def _terms(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        loss = self.criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, target))
        return named_terms("", loss)

    def _mean_over_labelled(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Average a criterion over the labelled pixels.

        The logits of ignored pixels are set to 0, and their loss, which is that of a single such pixel, is subtracted.
        """
        ignored = target == IGNORE_INDEX
        student_logits, teacher_logits = (logits.masked_fill(ignored[:, None], 0) for logits in (student, teacher))
        everything = self._terms(student_logits, teacher_logits, target)
        blank = self._terms(
            torch.zeros_like(student_logits[:1]),
            torch.zeros_like(teacher_logits[:1]),
            torch.full_like(target[:1], IGNORE_INDEX),
        )
        removed = ignored.sum()
        kept = (len(target) - removed).clamp(min=1)
        return {name: (len(target) * term - removed * blank[name]) / kept for name, term in everything.items()}


def _rows(logits: Tensor) -> Tensor:
    """Return maps `(B, K, H, W)` as `(B * H * W, K)`, in which the values of a class are contiguous, as in the maps."""
    return logits.transpose(0, 1).flatten(1).t()
