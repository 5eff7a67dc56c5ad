"""Relational knowledge distillation (RKD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_positive, check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs


def _distances(feature: Tensor, squared: bool, eps: float) -> Tensor:
    """Return the Euclidean distances `(B, B)` divided by their mean; the diagonal is 0."""
    # |x|² + |y|² - 2xy would lose precision for close samples far from the origin
    x = feature.flatten(1)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.square().clamp(min=eps) if squared else distance.clamp(min=math.sqrt(eps))
    distance = distance.masked_fill(torch.eye(len(feature), dtype=torch.bool, device=feature.device), 0)
    return distance / (distance.sum() / (distance > 0).sum().clamp(min=1)).clamp(min=torch.finfo(distance.dtype).tiny)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def rkd_distance_loss(
    student_feature: Tensor, teacher_feature: Tensor, squared: bool = False, eps: float = 1e-12
) -> Tensor:
    r"""Huber loss between the normalized pairwise distances of samples.

    $$ \frac{1}{B^2} \sum_{ij} h(d_{s,ij} / \mu_s - d_{t,ij} / \mu_t), \quad
       d_{ij} = \sqrt{\max(\lVert x_i - x_j \rVert^2, \epsilon)}, \; d_{ii} = 0, \quad
       h(u) = u^2 / 2 \text{ if } |u| < 1 \text{ else } |u| - 1/2 $$

    $\mu$ is the mean distance between two different samples.

    Args:
        student_feature: Student feature `(B, C, ...)`; all dimensions except the first are flattened.
        teacher_feature: Teacher feature `(B, D, ...)`.
        squared: Whether squared distances are compared.
        eps: Lower bound of the squared distance; closer samples have no gradient.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). As in the authors' code, the mean
        includes the pairs of a sample with itself; the paper sums over different samples.

    Example:
        >>> feature = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> rkd_distance_loss(10 * feature, feature).item() < 1e-12
        True
    """
    return F.smooth_l1_loss(_distances(student_feature, squared, eps), _distances(teacher_feature, squared, eps))


def _angles(feature: Tensor) -> Tensor:
    """Return the cosines `(B, B, B)` of the angles at each sample (first dimension) between all pairs of samples."""
    x = feature.flatten(1)
    direction = unit_vectors(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return direction @ direction.mT


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def rkd_angle_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Huber loss between the angles of all triplets of samples.

    $$ \frac{1}{B^3} \sum_{ijk} h(\cos \angle_{s,ijk} - \cos \angle_{t,ijk}), \quad
       \cos \angle_{ijk} = \langle e_{ij}, e_{ik} \rangle, \; e_{ij} = (x_j - x_i) / \lVert x_j - x_i \rVert $$

    The function h is defined in `rkd_distance_loss`. The memory use is B * B * (B + C) values.

    Args:
        student_feature: Student feature `(B, C, ...)`; all dimensions except the first are flattened.
        teacher_feature: Teacher feature `(B, D, ...)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). As in the authors' code, the mean
        includes all triplets; the paper sums over different samples.

    Example:
        >>> feature = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 1.0]])
        >>> rkd_angle_loss(2 * feature.flip(1) + 1, feature).item() < 1e-12
        True
    """
    return F.smooth_l1_loss(_angles(student_feature), _angles(teacher_feature))


class RKD(DistillLoss):
    """Relational KD: match pairwise distances and angles.

    The loss compares distances and angles between the samples of a batch (`rkd_distance_loss`, `rkd_angle_loss`). Both
    terms are invariant to translation, rotation, reflection and uniform scaling of the features of either network.
    Feature sizes may differ.

    Args:
        student_layers: Student layers whose features are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        distance_weight: Weight of `rkd_distance_loss`, at least 0.
        angle_weight: Weight of `rkd_angle_loss`, at least 0. Its memory use is cubic in the batch size; 0 avoids it.
        squared: Whether squared distances are compared.
        eps: Lower bound of the squared distance, greater than 0; closer samples have no gradient.

    Raises:
        ValueError: If a weight is negative, both weights are 0, or `eps` is not greater than 0.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). The authors use the weights 1 and
        2 for metric learning; 25 and 50 follow the CIFAR-100 benchmark (Tian et al., arXiv 1910.10699).
    """

    reads_logits = False
    compares_samples = True
    per_process = "distances and angles between images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        if distance_weight == angle_weight == 0:
            raise ValueError("distance_weight and angle_weight are both 0; set at least one of them")
        check_positive("typically 1e-12", eps=eps)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.squared = squared
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted terms `distance` and `angle`, omitting those with weight 0."""
        pairs, terms = self.pairs(student, teacher), {}
        if self.distance_weight:
            losses = [rkd_distance_loss(*pair, self.squared, self.eps) for pair in pairs]
            terms["distance"] = self.distance_weight * total(losses)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * total([rkd_angle_loss(*pair) for pair in pairs])
        return terms
