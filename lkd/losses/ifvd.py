"""Intra-class feature variation distillation (IFVD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._dense import class_masks, enlarged, logit_map, resized_labels
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def _similarity_to_center(feature: Tensor, masks: Tensor) -> Tensor:
    """Return the cosine similarity `(B, P)` of each pixel with the center of its class, 0 without a class.

    Args:
        feature: Features of the pixels `(B, C, P)`.
        masks: 1 where a pixel has a class, otherwise 0 `(B, K, P)`.
    """
    centers = unit_vectors(feature @ masks.mT, dim=1)  # sums: a center's length does not matter
    return (unit_vectors(feature, dim=1) * (centers @ masks)).sum(1)


@check_shapes(student_feature="B C H W", teacher_feature="B D H W", target="B H W")
@full_precision
def ifvd_loss(student_feature: Tensor, teacher_feature: Tensor, target: Tensor, num_classes: int) -> Tensor:
    r"""Mean squared error between the cosine similarities of pixels with the center of their class.

    $$ \frac{1}{B H W} \sum_{i, p} \left( \cos(f^s_{ip}, \mu^s_{i y_{ip}}) - \cos(f^t_{ip}, \mu^t_{i y_{ip}})
       \right)^2, \quad \mu_{ik} = \mathrm{mean}_{p: y_{ip} = k} f_{ip} $$

    Pixels without a label contribute 0 and count in the mean.

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        target: Class of each pixel `(B, H, W)`, or `IGNORE_INDEX`.
        num_classes: Number of classes.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    Raises:
        ValueError: If a label is out of range (on the CPU; on a GPU, a device-side assertion fails).

    References:
        Wang et al.: Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020.

    Example:
        >>> import torch
        >>> feature, target = torch.rand(2, 8, 4, 4), torch.arange(16).view(1, 4, 4).repeat(2, 1, 1) % 3
        >>> ifvd_loss(feature, 3 * feature, target, num_classes=3).item() < 1e-12
        True
    """
    masks = class_masks(target, num_classes).flatten(2)
    student, teacher = (
        _similarity_to_center(feature.flatten(2), masks.to(feature.dtype))
        for feature in (student_feature, teacher_feature)
    )
    return F.mse_loss(student, teacher)


class IFVD(DistillLoss):
    """Intra-class feature variation distillation: match how pixels vary around the center of their class.

    The center of a class is the mean feature of its pixels in an image. The student matches the teacher's cosine
    similarity of each pixel with the center of its class (see `ifvd_loss`). The masks are resized to the feature maps
    by nearest neighbor. The numbers of channels may differ. The losses of the layers are summed. If maps differ in
    size, the smaller one is interpolated to the size of the larger one.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.

    Raises:
        ValueError: At the start of training, if a layer does not return a feature map. In `forward`, if a label is out
            of range (on the CPU; on a GPU, a device-side assertion fails).

    References:
        Wang et al.: Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020. The authors use
        the weight 200 on Cityscapes, in addition to pixel-wise distillation and an adversarial term. Pixels without a
        label contribute 0 and count in the mean, as in their code.
    """

    needs_build = False  # `build` only checks the layers
    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@last_stage",), teacher_layers: Sequence[str] = ("@last_stage",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the shapes of the features."""
        logit_map(self, "student", student.outputs)
        self.pairs(student.outputs, teacher.outputs, dims=4)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `ifvd_loss` over the layers."""
        num_classes, losses = logit_map(self, "student", student).shape[1], []
        for pair in self.pairs(student, teacher):
            student_feature, teacher_feature = enlarged(*pair)
            target = resized_labels(batch.target, (student_feature.shape[2], student_feature.shape[3]))
            losses.append(ifvd_loss(student_feature, teacher_feature, target, num_classes))
        return total(losses)
