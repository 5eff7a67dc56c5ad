"""Knowledge translation and adaptation (KTA)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import same_size
from lkd.losses._checks import check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B C *", teacher_feature="B C *")
@full_precision
def kta_loss(student_feature: Tensor, teacher_feature: Tensor, p: float = 1.0, q: float = 2.0) -> Tensor:
    r"""Distance of two features, each divided by its length.

    $$ \frac{1}{B} \sum_i \lVert \hat F_{s, i} - \hat F_{t, i} \rVert_p, \quad
       \hat F = \mathrm{vec}(F) / \lVert \mathrm{vec}(F) \rVert_q $$

    For p = 1, the mean over the elements takes the place of their sum.

    Args:
        student_feature: `(B, C, *)`, where `*` is any number of further dimensions.
        teacher_feature: `(B, C, *)`.
        p: Power of the distance, at least 1.
        q: Power of the length, at least 1.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019 (arXiv 1903.04688),
        which sums the p-th powers for every p. The mean, and the root, are torchdistill's code.

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
    r"""Distance of how the pixels of two features belong together, channel by channel.

    $$ \frac{1}{B} \sum_{i, c} \frac{1}{H W} \lVert a a^\top - b b^\top \rVert_F, \quad
       a = \mathrm{vec}(F_{s, ic}) / \lVert \mathrm{vec}(F_{s, ic}) \rVert, \; b \text{ likewise from } F_t $$

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, C, H, W)`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019 (arXiv 1903.04688),
        where a pixel is a vector of all channels and there is one affinity of each pair of pixels; one for each
        channel is torchdistill's code.

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> affinity_loss(feature, -feature).item()
        0.0
    """
    student, teacher = (unit_vectors(f.flatten(2), dim=2) for f in (student_feature, teacher_feature))
    # aa' - bb' = (uv' + vu') / 2 with u = a - b and v = a + b: no matrix of all pairs of pixels, and exact near 0.
    less, more = student - teacher, student + teacher
    lengths = torch.linalg.vector_norm(less, dim=2) * torch.linalg.vector_norm(more, dim=2)
    parts = torch.stack([lengths, (less * more).sum(2)], dim=2)
    distances: Tensor = torch.linalg.vector_norm(parts, dim=2) / math.sqrt(2)
    return distances.sum(1).mean() / student.shape[2]


class KTA(DistillLoss):
    """Knowledge translation and adaptation: a feature map's direction, and which of its pixels belong together.

    Two 3x3 convolutions with BatchNorm and ReLU bring the student's feature map to the teacher's channels: one for
    `kta_loss`, one for `affinity_loss`. The larger map is averaged to the smaller one's size first.

    Args:
        student_layers: Layers of the student whose feature maps it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        p: Power of the distance, at least 1.
        q: Power of the length, at least 1.
        adaptation_weight: Weight of `kta_loss`, at least 0.
        affinity_weight: Weight of `affinity_loss`, at least 0.

    Raises:
        ValueError: If a power is less than 1 or a weight negative, or, in training, a layer returns no feature map.

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019 (arXiv 1903.04688). There an
        autoencoder, trained beforehand, translates the teacher's feature map; here it is compared as it is.
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
                raise ValueError(f"{name} must be at least 1, got {power}; {usual} is usual")
        check_weights(adaptation_weight=adaptation_weight, affinity_weight=affinity_weight)
        self.p, self.q = p, q
        self.adaptation_weight, self.affinity_weight = adaptation_weight, affinity_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the adapters."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        channels = [(ours.shape[1], theirs.shape[1]) for ours, theirs in pairs]
        self.feature_adapters = nn.ModuleList(_adapter(*sizes) for sizes in channels)
        self.affinity_adapters = nn.ModuleList(_adapter(*sizes) for sizes in channels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`adaptation`, the weighted sum of `kta_loss` over the layers, and `affinity`, that of `affinity_loss`."""
        adaptation, affinity = [], []
        for number, pair in enumerate(self.pairs(student, teacher)):
            ours, theirs = same_size(*pair)
            adaptation.append(kta_loss(self.feature_adapters[number](ours), theirs, self.p, self.q))
            affinity.append(affinity_loss(self.affinity_adapters[number](ours), theirs))
        return {
            "adaptation": self.adaptation_weight * total(adaptation),
            "affinity": self.affinity_weight * total(affinity),
        }


def _adapter(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
