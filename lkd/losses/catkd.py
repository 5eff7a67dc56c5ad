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
    r"""Class activation maps: a linear classifier applied to each pixel.

    $$ M_{ikhw} = \sum_c W_{kc} F_{ichw} + b_k $$

    The mean of a map over the pixels is the logit of its class.

    Args:
        feature: Feature map before global average pooling `(B, C, H, W)`.
        weight: Weight of the classifier `(K, C)`.
        bias: Bias of the classifier `(K,)`; `None` for no bias.

    Returns:
        Class activation maps `(B, K, H, W)`.

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
    r"""Mean squared error between average-pooled class activation maps.

    $$ \frac{1}{B K r^2} \sum_{ik} \lVert \phi(M_{s,ik}) - \phi(M_{t,ik}) \rVert^2, \quad
       \phi(M) = \mathrm{pool}_r(M) / \lVert \mathrm{pool}_r(M) \rVert $$

    Args:
        student_maps: Student class activation maps `(B, K, H, W)`.
        teacher_maps: Teacher class activation maps `(B, K, H', W')`.
        resolution: Number of rows and columns r to which the maps are average-pooled.
        normalize: Whether each map is normalized to unit length.

    Returns:
        Scalar loss (float32 for half-precision inputs).

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
    """Class attention transfer: match class activation maps.

    The maps are computed by applying the classifier to each pixel, so the method supports all networks whose classifier
    is a single linear layer after global average pooling. Student and teacher must have the same classes.

    Args:
        student_layer: Student layer that returns the feature map before global pooling.
        teacher_layer: Teacher layer that returns the feature map before global pooling.
        student_head: Classifier of the student; `None` if `student_layer` returns class activation maps itself.
        teacher_head: Classifier of the teacher; `None` if `teacher_layer` returns class activation maps itself.
        resolution: Number of rows and columns to which the maps are average-pooled.
        normalize: Whether each map is normalized to unit length.

    Raises:
        ValueError: If `resolution` is less than 1. At the start of training, if a layer does not return a feature map
            or the classifier is not a single linear layer.

    References:
        Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023 (arXiv 2304.12777). The authors
        replace the classifier by a 1x1 convolution before the pooling, which is equivalent.
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
            raise ValueError(f"resolution must be at least 1, got {resolution}; typically 2")
        self.student_head = student_head
        self.teacher_head = teacher_head
        self.resolution = resolution
        self.normalize = normalize

    def build(self, student: Probe, teacher: Probe) -> None:
        """Find the classifiers of both networks."""
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        # a tuple, so that they are not registered as submodules
        self._heads = tuple(
            None if layer is None else linear_classifier("CATKD", role, probe, layer, feature.shape[1])
            for role, probe, layer, feature in (
                ("student", student, self.student_head, student_feature),
                ("teacher", teacher, self.teacher_head, teacher_feature),
            )
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `catkd_loss`."""
        features = self.pairs(student, teacher)[0]
        student_maps, teacher_maps = (
            feature if head is None else class_activation_maps(feature, head.weight, head.bias)
            for feature, head in zip(features, self._heads, strict=True)
        )
        # a teacher that is being trained, such as a peer, must not receive gradients through its classifier
        return catkd_loss(student_maps, teacher_maps.detach(), self.resolution, self.normalize)
