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
    """Euclidean distances `(B, B)` over their mean; 0 from a sample to itself."""
    # not by |x|² + |y|² - 2xy, which would lose the digits of close samples far from the origin
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
    r"""Huber loss between the distances of all pairs of samples, relative to their mean.

    $$ \frac{1}{B^2} \sum_{ij} h(d_{s,ij} / \mu_s - d_{t,ij} / \mu_t), \quad
       d_{ij} = \sqrt{\max(\lVert x_i - x_j \rVert^2, \epsilon)}, \; d_{ii} = 0, \quad
       h(u) = u^2 / 2 \text{ if } |u| < 1 \text{ else } |u| - 1/2 $$

    $\mu$ is the mean of the distances between two different samples.

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.
        squared: Compare squared distances.
        eps: The least squared distance; nearer samples have no gradient.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). The mean runs over all pairs, also
        of a sample with itself, as in the authors' code; the paper sums over different samples.

    Example:
        >>> feature = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> rkd_distance_loss(10 * feature, feature).item() < 1e-12
        True
    """
    return F.smooth_l1_loss(_distances(student_feature, squared, eps), _distances(teacher_feature, squared, eps))


def _angles(feature: Tensor) -> Tensor:
    """Cosines `(B, B, B)` of the angles at a sample (first) between the directions to two others."""
    x = feature.flatten(1)
    direction = unit_vectors(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return direction @ direction.mT


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def rkd_angle_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Huber loss between the angles of all triples of samples.

    $$ \frac{1}{B^3} \sum_{ijk} h(\cos \angle_{s,ijk} - \cos \angle_{t,ijk}), \quad
       \cos \angle_{ijk} = \langle e_{ij}, e_{ik} \rangle, \; e_{ij} = (x_j - x_i) / \lVert x_j - x_i \rVert $$

    with h as in `rkd_distance_loss`. It holds B * B * (B + C) numbers in memory.

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). The mean runs over all triples, as
        in the authors' code; the paper sums over different samples.

    Example:
        >>> feature = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 1.0]])
        >>> rkd_angle_loss(2 * feature.flip(1) + 1, feature).item() < 1e-12
        True
    """
    return F.smooth_l1_loss(_angles(student_feature), _angles(teacher_feature))


class RKD(DistillLoss):
    """Relational distillation: distances and angles between the samples of a batch are to be the teacher's.

    Features may differ in size; a common scale, and for angles a rotation, costs nothing.

    Args:
        student_layers: Layers of the student whose features it reads, each by itself; the losses are added.
        teacher_layers: The teacher's, as many.
        distance_weight: Weight of `rkd_distance_loss`, at least 0.
        angle_weight: Weight of `rkd_angle_loss`, at least 0; 0 saves its memory, which grows with the batch cubed.
        squared: Compare squared distances.
        eps: The least squared distance, greater than 0; nearer samples have no gradient.

    Raises:
        ValueError: If a weight is negative, or both are 0, or `eps` is not greater than 0.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068), who weigh the terms 1 and 2 for
        metric learning; 25 and 50 are the CIFAR-100 benchmark's (Tian et al., arXiv 1910.10699).
    """

    reads_logits = False
    compares_samples = True
    per_process = "measures distances and angles of its images"

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
            raise ValueError("distance_weight and angle_weight are both 0, so RKD compares nothing; set one of them")
        check_positive("1e-12 is usual", eps=eps)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.squared = squared
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The terms `distance` and `angle`, as weighted, of those whose weight is not 0."""
        pairs, terms = self.pairs(student, teacher), {}
        if self.distance_weight:
            losses = [rkd_distance_loss(ours, theirs, self.squared, self.eps) for ours, theirs in pairs]
            terms["distance"] = self.distance_weight * total(losses)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * total([rkd_angle_loss(ours, theirs) for ours, theirs in pairs])
        return terms
