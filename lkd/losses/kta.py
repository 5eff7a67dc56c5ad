"""Knowledge translation and adaptation (KTA)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, same_size
from lkd.losses._checks import check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B C *", teacher_feature="B C *")
@full_precision
def kta_loss(student_feature: Tensor, teacher_feature: Tensor, p: float = 1.0, q: float = 2.0) -> Tensor:
    r"""Distance between features that are normalized to unit length.

    $$ \frac{1}{B} \sum_i \lVert \hat F_{s, i} - \hat F_{t, i} \rVert_p, \quad
       \hat F = \mathrm{vec}(F) / \lVert \mathrm{vec}(F) \rVert_q $$

    For p = 1, the sum over the elements is replaced by their mean.

    Args:
        student_feature: Student feature `(B, C, *)`, where `*` is any number of further dimensions.
        teacher_feature: Teacher feature `(B, C, *)`.
        p: Order of the distance, at least 1.
        q: Order of the norm used for normalization, at least 1.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019 (arXiv 1903.04688). The paper
        sums the p-th powers for every p. The mean for p = 1 and the root follow torchdistill's code.

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> kta_loss(feature, 4 * feature).item()
        0.0
    """
    student, teacher = (unit_vectors(f.flatten(1), dim=1, p=q) for f in (student_feature, teacher_feature))
    difference = student - teacher
    if p == 1:
        return difference.abs().mean()
    distances: Tensor = torch.linalg.vector_norm(difference, p, dim=1)
    return distances.mean()


@check_shapes(student_feature="B C H W", teacher_feature="B C H W")
@full_precision
def affinity_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Distance between the spatial affinity matrices of two features, for each channel.

    $$ \frac{1}{B} \sum_{i, c} \frac{1}{H W} \lVert a a^\top - b b^\top \rVert_F, \quad
       a = \mathrm{vec}(F_{s, ic}) / \lVert \mathrm{vec}(F_{s, ic}) \rVert, \; b \text{ likewise from } F_t $$

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, C, H, W)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019 (arXiv 1903.04688). In the paper,
        a pixel is a vector of all channels, and each pair of pixels has one affinity. One affinity for each channel
        follows torchdistill's code.

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> affinity_loss(feature, -feature).item()
        0.0
    """
    student, teacher = (unit_vectors(f.flatten(2), dim=2) for f in (student_feature, teacher_feature))
    # aa' - bb' = (uv' + vu') / 2 with u = a - b and v = a + b: avoids the matrix of all pairs of pixels.
    less, more = student - teacher, student + teacher
    lengths = torch.linalg.vector_norm(less, dim=2) * torch.linalg.vector_norm(more, dim=2)
    parts = torch.stack([lengths, (less * more).sum(2)], dim=2)
    distances: Tensor = torch.linalg.vector_norm(parts, dim=2) / math.sqrt(2)
    return distances.sum(1).mean() / student.shape[2]


class KTA(DistillLoss):
    """Knowledge adaptation: match features and affinities.

    The loss compares normalized feature maps (`kta_loss`) and the affinities of their pixels (`affinity_loss`). For
    each of the two terms, a 3x3 convolution with BatchNorm and ReLU maps the student's feature map to the teacher's
    channels. The larger map is average-pooled to the size of the smaller one first.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        p: Order of the distance, at least 1.
        q: Order of the norm used for normalization, at least 1.
        adaptation_weight: Weight of `kta_loss`, at least 0.
        affinity_weight: Weight of `affinity_loss`, at least 0.

    Raises:
        ValueError: If `p` or `q` is less than 1 or a weight is negative. At the start of training, if a layer does not
            return a feature map.

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019 (arXiv 1903.04688). In the paper,
        a pretrained autoencoder translates the teacher's feature map; here, the feature map is compared directly.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@map",),
        teacher_layers: Sequence[str] = ("@map",),
        p: float = 1.0,
        q: float = 2.0,
        adaptation_weight: float = 50.0,
        affinity_weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        for name, power, usual in (("p", p, 1), ("q", q, 2)):
            if not power >= 1:
                raise ValueError(f"{name} must be at least 1, got {power}; typically {usual}")
        check_weights(adaptation_weight=adaptation_weight, affinity_weight=affinity_weight)
        self.p, self.q = p, q
        self.adaptation_weight, self.affinity_weight = adaptation_weight, affinity_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the adapters."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        channels = channel_pairs(pairs)
        self.feature_adapters = nn.ModuleList(_adapter(*sizes) for sizes in channels)
        self.affinity_adapters = nn.ModuleList(_adapter(*sizes) for sizes in channels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted terms `adaptation` (`kta_loss`) and `affinity` (`affinity_loss`)."""
        adaptation, affinity = [], []
        for number, pair in enumerate(self.pairs(student, teacher)):
            student_feature, teacher_feature = same_size(*pair)
            adaptation.append(kta_loss(self.feature_adapters[number](student_feature), teacher_feature, self.p, self.q))
            affinity.append(affinity_loss(self.affinity_adapters[number](student_feature), teacher_feature))
        return {
            "adaptation": self.adaptation_weight * total(adaptation),
            "affinity": self.affinity_weight * total(affinity),
        }


def _adapter(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
