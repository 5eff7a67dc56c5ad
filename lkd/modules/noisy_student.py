"""A teacher that sees an image clearly, and a student that sees it changed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lkd.modules.distill import DistillModule
from lkd.types import Batch, Outputs


class Pair(NamedTuple):
    """Two views of the same images, each `(B, C, H, W)`: the teacher's, and the student's."""

    weak: Tensor
    strong: Tensor


class NoisyStudentModule(DistillModule):
    """Noisy student training: the teacher answers to the weak view of an image, the student learns from the strong one.

    It is `DistillModule`, but for the views: training batches have two of each image, as `lkd.datamodules.StrongView`
    makes them, and the criterion compares what the teacher says of the first with what the student says of the second.
    The criterion is a mean over all images, with and without a label; the labels' loss is a mean over those with one
    (`label_size` of the data module sets how many). The paper's other noise, dropout and stochastic depth, is the
    student's network's own.

    Raises:
        ValueError: As `DistillModule`, or if training batches have another number of views, or mixed images.

    References:
        Xie, Luong, Hovy, Le: Self-training with Noisy Student improves ImageNet classification, CVPR 2020
        (arXiv 1911.04252). The authors ask the teacher once, of images that are not augmented at all (`augment: []`);
        here it answers anew in each epoch, of the weak view. In their code the soft labels count for unlabelled images
        only, and a labelled image has its label's loss alone; here labelled images are distilled as well. Their soft
        term is the mean over the unlabelled images of a batch times the number of these per labelled image
        (`unlabel_ratio`); here it is the mean over all images, times `distill_weight`.
    """

    def unpack(self, batch: Any) -> Batch:
        """As in `ClassificationModule`; two views of each image become one input, a `Pair`."""
        rows = super().unpack(batch)
        if rows.views != 2:
            return rows
        if rows.mixed is not None:
            raise ValueError(
                "NoisyStudentModule compares two views of the same image, and this datamodule mixes each with another "
                "partner: leave its `mix` out"
            )
        index = None if rows.index is None else rows.index.chunk(2)[0]
        return Batch(Pair(*rows.input.chunk(2)), rows.target.chunk(2)[0], index)

    def student_outputs(self, batch: Batch) -> Outputs:
        """What the student says of the strong view."""
        if not isinstance(batch.input, Pair):
            raise ValueError(
                "NoisyStudentModule trains with two views of each image, a weak and a strong one, and this "
                f"datamodule's batches have {batch.views}: set its `views`, as in configs/methods/noisy_student.yaml"
            )
        return super().student_outputs(batch._replace(input=batch.input.strong))

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """What the teacher says of the weak view; in evaluation there is but one."""
        weak = batch.input.weak if isinstance(batch.input, Pair) else batch.input
        return super().teacher_outputs(batch._replace(input=weak))
