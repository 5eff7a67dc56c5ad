"""Localization distillation (LD)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkd.losses._boxes import box_divergence, check_boxes, rows
from lkd.losses._checks import check_dims, check_positive, check_temperature, layer_list
from lkd.losses._dense import enlarged, interpolated
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, read_layers, total
from lkd.types import Batch, Outputs, Predictions, Probe


@check_shapes(student_boxes="N 4M", teacher_boxes="N 4M", weight="N")
@full_precision
def ld_loss(
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    weight: Tensor,
    temperature: float = 10.0,
    avg_factor: float = 4.0,
) -> Tensor:
    r"""Weighted divergence between the distributions over the positions of a box's sides.

    $$ \frac{\tau^2}{a M} \sum_i w_i \sum_{e=1}^{4} \mathrm{KL}(p^t_{i,e} \,\Vert\, p^s_{i,e}) $$

    Args:
        student_boxes: Logits of the student's distributions `(N, 4 * M)`, M = reg_max + 1 for each side.
        teacher_boxes: Logits of the teacher's distributions `(N, 4 * M)`.
        weight: Weight of each box `(N,)`.
        temperature: Softmax temperature, greater than 0.
        avg_factor: Divisor a of the sum, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Zheng et al.: Localization Distillation for Dense Object Detection, CVPR 2022 (arXiv 2102.12252). The mean over
        the M distances follows the authors' code; the paper's divergence is a sum.

    Example:
        >>> import torch
        >>> boxes = torch.rand(3, 4 * 17)
        >>> ld_loss(boxes, boxes, torch.ones(3)).item()
        0.0
    """
    distances = student_boxes.shape[1] // 4
    return (weight * box_divergence(student_boxes, teacher_boxes, temperature)).sum() / (distances * avg_factor)


class LD(DistillLoss):
    """Localization distillation: match the distributions that a detector predicts for the sides of its boxes.

    It requires detectors whose heads predict, at each position and for each side of a box, logits over reg_max + 1
    distances (generalized focal loss). Each position is weighted by the student's largest class probability there,
    which receives no gradient (see `ld_loss`). The loss is a sum over the positions, averaged over the images and
    summed over the layers. Smaller maps are interpolated to the size of larger ones.

    The authors distil only the positions that the detector assigns to an object, and those of a "valuable localization
    region" around them. A criterion does not know this assignment, so all positions are distilled here; the class
    probability is close to 0 at most of those that are not assigned.

    Args:
        student_layers: Student layers that return the logits of the distributions `(B, 4 * (reg_max + 1), H, W)`. If a
            head is called once per level, a forward hook on it sees only the last level. For lkd's detectors,
            `@box_maps` and, for `class_layers`, `@class_maps` refer to all levels.
        teacher_layers: Teacher layers, one for each student layer.
        class_layers: Student layers that return the class logits of the same positions `(B, K, H, W)`, one for each
            layer. If empty, the student's logits are used.
        temperature: Softmax temperature, greater than 0.
        avg_factor: Divisor of the sum, greater than 0.

    Raises:
        ValueError: If the temperature or `avg_factor` is not greater than 0. At the start of training, if no layers are
            set, if their numbers do not agree, if a layer does not return a map of the form above, or if the box maps
            of a detector of `lkd.models` are not distributions.

    References:
        Zheng et al.: Localization Distillation for Dense Object Detection, CVPR 2022 (arXiv 2102.12252). The authors
        use the weight 0.25 for GFL on COCO and `avg_factor` 16 for the valuable region, and sum over the images of a
        process.
    """

    needs_build = False  # `build` only checks the layers
    reads_logits = False  # class logits are read, but not compared

    def __init__(
        self,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] = (),
        class_layers: Sequence[str] = (),
        temperature: float = 10.0,
        avg_factor: float = 4.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("typically 4", avg_factor=avg_factor)
        self.student_layers += layer_list("class_layers", class_layers)
        self.temperature = check_temperature(temperature)
        self.avg_factor = avg_factor

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers."""
        for probe, layers in ((student, self.student_layers), (teacher, self.teacher_layers)):
            _check_detector(probe, layers)
        for student_boxes, teacher_boxes, scores in self._levels(student.outputs, teacher.outputs):
            check_dims("LD", 4, student=student_boxes, teacher=teacher_boxes, class_score=scores)
            check_boxes("LD", student_boxes, teacher_boxes)

    def _levels(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the student's and the teacher's boxes and the student's class logits of each layer."""
        teacher_boxes = read_layers(teacher, self.teacher_layers)
        features = read_layers(student, self.student_layers)
        levels = len(teacher_boxes)
        student_boxes, scores = features[:levels], features[levels:] or [student.logits] * levels
        if len(student_boxes) != levels or len(scores) != levels:
            raise ValueError(
                f"LD requires as many student_layers as teacher_layers, and as many class_layers or none, got "
                f"{len(self.teacher_layers)} teacher_layers ({', '.join(self.teacher_layers)}) and the student's "
                f"{', '.join(self.student_layers)}"
            )
        return list(zip(student_boxes, teacher_boxes, scores, strict=True))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `ld_loss` over the layers."""
        losses = []
        for student_boxes, teacher_boxes, scores in self._levels(student, teacher):
            student_boxes, teacher_boxes = enlarged(student_boxes, teacher_boxes)
            height, width = student_boxes.shape[2:]
            largest = wide(scores.detach()).amax(1, keepdim=True).sigmoid()
            weight = interpolated(largest, (height, width)).flatten()
            avg_factor = self.avg_factor * len(student_boxes)
            losses.append(ld_loss(rows(student_boxes), rows(teacher_boxes), weight, self.temperature, avg_factor))
        return total(losses)


def _check_detector(probe: Probe, layers: Sequence[str]) -> None:
    """Check that a detector of `lkd.models` predicts distributions if its `@box_maps` are read."""
    predictions: object = probe.outputs.logits
    if not isinstance(predictions, Predictions) or not any(layer.startswith("box_maps.") for layer in layers):
        return
    if "bbox_distribution" not in predictions.values.get("head", ()):
        raise ValueError(
            f"LD compares distributions of boxes, but the box maps of this {type(probe.network).__name__} are "
            "coordinates; use detectors that predict distributions, such as lkd.models.fcos with reg_max"
        )
