"""Class attention transfer (CAT-KD)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._classifiers import linear_classifier
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs, Probe


@check_shapes(feature="B C H W", weight="K C", bias="K")
@full_precision
def class_activation_maps(feature: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""What a linear classifier says of every pixel: its mean over the pixels is the logits.

    $$ M_{ikhw} = \sum_c W_{kc} F_{ichw} + b_k $$

    Args:
        feature: `(B, C, H, W)`: what the global pooling reads.
        weight: The classifier's, `(K, C)`.
        bias: The classifier's, `(K,)`; None: 0.

    Returns:
        `(B, K, H, W)`.

    References:
        Zhou et al.: Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150).

    Example:
        >>> import torch
        >>> feature, head = torch.rand(2, 8, 4, 4), torch.nn.Linear(8, 3)
        >>> maps = class_activation_maps(feature, head.weight, head.bias)
        >>> torch.allclose(maps.mean((2, 3)), head(feature.mean((2, 3))), atol=1e-5)
        True
    """
    dtype = feature.dtype
    return F.conv2d(feature, weight.to(dtype)[:, :, None, None], None if bias is None else bias.to(dtype))


@check_shapes(student_maps="B K H W", teacher_maps="B K H' W'")
@full_precision
def catkd_loss(student_maps: Tensor, teacher_maps: Tensor, resolution: int = 2, normalize: bool = True) -> Tensor:
    r"""Mean squared difference of class activation maps at a low resolution.

    $$ \frac{1}{B K r^2} \sum_{ik} \lVert \phi(M_{s,ik}) - \phi(M_{t,ik}) \rVert^2, \quad
       \phi(M) = \mathrm{pool}_r(M) / \lVert \mathrm{pool}_r(M) \rVert $$

    Args:
        student_maps: `(B, K, H, W)`, one map for each class.
        teacher_maps: `(B, K, H', W')`.
        resolution: r: rows and columns to which both are averaged.
        normalize: Whether each map is divided by its length.

    Returns:
        A scalar; float32 for maps in half precision, else the maps' type.

    References:
        Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023 (arXiv 2304.12777).

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 10, 4, 4)
        >>> catkd_loss(maps, 3 * maps).item() < 1e-12
        True
    """
    student, teacher = (F.adaptive_avg_pool2d(maps, resolution) for maps in (student_maps, teacher_maps))
    if normalize:
        student, teacher = (unit_vectors(maps.flatten(2), dim=2) for maps in (student, teacher))
    return F.mse_loss(student, teacher)


class CATKD(DistillLoss):
    """Class attention transfer: for every class, the student is to look where the teacher looks.

    Maps of the classes are made by applying the classifier to every pixel, so any network fits whose classifier is one
    linear layer behind the global average pooling. Both need the same classes.

    Args:
        student_layer: Layer of the student whose map the pooling reads.
        teacher_layer: The teacher's.
        student_head: The student's classifier; None: `student_layer` returns the maps of the classes itself.
        teacher_head: The teacher's; None: `teacher_layer` returns the maps of the classes itself.
        resolution: Rows and columns to which the maps are averaged.
        normalize: Whether each map is divided by its length.

    Raises:
        ValueError: If the resolution is below 1, or, in training, a layer returns no feature map or the classifier is
            another kind of layer.

    References:
        Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023 (arXiv 2304.12777), who replace the
        classifier by a 1x1 convolution before the pooling, which is the same.
    """

    def __init__(
        self,
        student_layer: str = "@map",
        teacher_layer: str = "@map",
        student_head: str | None = "@head",
        teacher_head: str | None = "@head",
        resolution: int = 2,
        normalize: bool = True,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        if resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {resolution}; 2 is usual")
        self.student_head = student_head
        self.teacher_head = teacher_head
        self.resolution = resolution
        self.normalize = normalize

    def build(self, student: Probe, teacher: Probe) -> None:
        """Find the classifiers."""
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        # in a tuple, as they stay parts of the networks
        self._heads = tuple(
            None if layer is None else linear_classifier("CATKD", role, probe, layer, feature.shape[1])
            for role, probe, layer, feature in (
                ("student", student, self.student_head, ours),
                ("teacher", teacher, self.teacher_head, theirs),
            )
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `catkd_loss`."""
        features = self.pairs(student, teacher)[0]
        ours, theirs = (
            feature if head is None else class_activation_maps(feature, head.weight, head.bias)
            for feature, head in zip(features, self._heads, strict=True)
        )
        # a teacher that trains itself, as a peer does, gets no gradient through its classifier
        return catkd_loss(ours, theirs.detach(), self.resolution, self.normalize)
