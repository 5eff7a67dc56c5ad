"""Noisy student training: teacher and student receive differently augmented views of an image."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lkd.modules.distill import DistillModule
from lkd.types import Batch, Outputs


class Pair(NamedTuple):
    """Two views `(B, C, H, W)` of the same images: `weak` for the teacher, `strong` for the student."""

    weak: Tensor
    strong: Tensor


class NoisyStudentModule(DistillModule):
    """Noisy student training: the student sees a strongly augmented view of an image, the teacher a weak one.

    The module differs from `DistillModule` only in the views. Training batches contain two views of each image, created
    by `lkd.datamodules.StrongView`, and the criterion compares the teacher's outputs for the first view with the
    student's outputs for the second. The criterion is averaged over all images, the cross-entropy over the labelled
    ones (their number is set by `label_size` of the data module). The paper's other noise, dropout and stochastic
    depth, must be part of the student network.

    The arguments are those of `DistillModule`.

    Raises:
        ValueError: As in `DistillModule`, or if training batches have a different number of views or mixed images.

    References:
        Xie, Luong, Hovy, Le: Self-training with Noisy Student improves ImageNet classification, CVPR 2020
        (arXiv 1911.04252). The authors run the teacher once, on images without augmentation (`augment: []`); here it
        runs in each epoch, on the weak view. In their code, soft labels are used for unlabelled images only, and
        labelled images contribute only their cross-entropy; here labelled images are distilled as well. Their soft term
        is the mean over the unlabelled images of a batch, times the number of these per labelled image
        (`unlabel_ratio`); here it is the mean over all images, times `distill_weight`.
    """

    def unpack(self, batch: Any) -> Batch:
        """Convert a batch as in `ClassificationModule`; two views of each image become one input, a `Pair`."""
        rows = super().unpack(batch)
        if rows.views != 2:
            return rows
        if rows.mixed is not None:
            raise ValueError(
                "NoisyStudentModule compares two views of the same image, but the data module mixes each view with a "
                "different partner; remove its `mix`"
            )
        index = None if rows.index is None else rows.index.chunk(2)[0]
        return Batch(Pair(*rows.input.chunk(2)), rows.target.chunk(2)[0], index)

    def student_outputs(self, batch: Batch) -> Outputs:
        """Compute the student's outputs for the strong view.

        Raises:
            ValueError: If the batch does not contain two views of each image.
        """
        if not isinstance(batch.input, Pair):
            raise ValueError(
                "NoisyStudentModule requires two views of each image, a weak and a strong one, but the batches have "
                f"{batch.views}; set `views` of the data module as in configs/methods/noisy_student.yaml"
            )
        return super().student_outputs(batch._replace(input=batch.input.strong))

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """Compute the teacher's outputs for the weak view; evaluation batches have only one view."""
        weak = batch.input.weak if isinstance(batch.input, Pair) else batch.input
        return super().teacher_outputs(batch._replace(input=weak))
