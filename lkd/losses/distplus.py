"""Distillation from a stronger adaptive teacher (DIST+)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, projection, same_size
from lkd.losses._checks import check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import total
from lkd.losses.dist import DIST, decorrelation
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B C H W", teacher_feature="B C H' W'")
@full_precision
def channel_relation_loss(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-8) -> Tensor:
    r"""One minus the Pearson correlation over the channels of each pixel.

    $$ 1 - \frac{1}{BHW} \sum_{ihw} \rho(F_{s,i \cdot hw}, F_{t,i \cdot hw}) $$

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, C, H', W')`. The larger map is average-pooled to the size of the
            smaller.
        eps: Constant added to the product of the norms in $\rho$.

    Returns:
        Scalar loss between 0 and 2 (float32 for half-precision inputs).

    References:
        Huang et al.: DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025.

    Example:
        >>> import torch
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> abs(channel_relation_loss(feature, 3 * feature + 1).item()) < 1e-5
        True
    """
    return decorrelation(*same_size(student_feature, teacher_feature), 1, eps)


@check_shapes(student_feature="B C H W", teacher_feature="B D H' W'")
@full_precision
def spatial_relation_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""One minus the Pearson correlation over the batch of the activity at each pixel.

    $$ 1 - \frac{1}{HW} \sum_{hw} \rho(A_{s,\cdot hw}, A_{t,\cdot hw}), \quad A_{ihw} = \sum_c F_{ichw} $$

    In distributed training, each process uses its own samples.

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H', W')`. The larger map is average-pooled to the size of the
            smaller.

    Returns:
        Scalar loss between 0 and 2 (float32 for half-precision inputs).

    References:
        Huang et al.: DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025.
    """
    student, teacher = (feature.sum(1) for feature in same_size(student_feature, teacher_feature))
    student, teacher = (activity - activity.mean(0) for activity in (student, teacher))
    return 1 - F.cosine_similarity(student, teacher, dim=0).mean()


class DISTPlus(DIST):
    """DIST+: DIST plus channel and spatial correlations.

    It adds two terms on feature maps to `DIST` and logs `train/distplus_channel` and `train/distplus_spatial` besides
    the terms of `DIST`. If a student layer has a different number of channels than the teacher layer, a 1x1 convolution
    with BatchNorm, trained with the student, adapts it for the channel term. The spatial term needs no adapter.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        beta: Weight of the inter-class term (classes of one sample).
        gamma: Weight of the intra-class term (samples of one class).
        channel_weight: Weight of the channel term; `iota` in torchdistill.
        spatial_weight: Weight of the spatial term; `kappa` in torchdistill.
        temperature: Softmax temperature, greater than 0.
        eps: Constant added to the product of the norms in the correlations of probabilities and channels, greater than
            0.

    Raises:
        ValueError: If a weight is negative, or if the temperature or `eps` is not greater than 0. At the start of
            training, if a layer does not return a feature map.

    References:
        Huang et al.: DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025. The channel term is
        one minus the correlation, as in the paper. torchdistill adds the correlation itself, which drives the channels
        apart. Its ImageNet configuration, the only public one, sets `beta` and `gamma` to 2 and multiplies the sum by
        2.
    """

    per_process = "correlations over images within a class and at each pixel"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@map",),
        teacher_layers: Sequence[str] = ("@map",),
        beta: float = 1.0,
        gamma: float = 1.0,
        channel_weight: float = 1.0,
        spatial_weight: float = 1.0,
        temperature: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(beta, gamma, temperature, eps)
        check_weights(channel_weight=channel_weight, spatial_weight=spatial_weight)
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)
        self.channel_weight = channel_weight
        self.spatial_weight = spatial_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the projections."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        channels = channel_pairs(pairs)
        self.projections = nn.ModuleList(
            nn.Identity() if student == teacher else projection(student, teacher) for student, teacher in channels
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the terms of `dist_loss`, `channel_relation_loss` and `spatial_relation_loss`."""
        pairs = self.pairs(student, teacher)
        projected = zip(self.projections, pairs, strict=True)
        channel = [
            channel_relation_loss(project(student_feature), teacher_feature, self.eps)
            for project, (student_feature, teacher_feature) in projected
        ]
        spatial = [spatial_relation_loss(*pair) for pair in pairs]
        return {
            **super().forward(student, teacher, batch),
            "channel": self.channel_weight * total(channel),
            "spatial": self.spatial_weight * total(spatial),
        }
