"""Double similarity distillation (DSD)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._dense import enlarged, interpolated, logit_maps
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def _residuals(features: Sequence[Tensor]) -> list[Tensor]:
    """Return the normalized differences `(B, H * W)` of the attention maps of all pairs of maps."""
    attention = [unit_vectors(feature.square().mean(1).flatten(1), dim=1) for feature in features]
    return [unit_vectors(later - earlier, dim=1) for earlier, later in combinations(attention, 2)]


@check_shapes(student_maps="B C_l H W", teacher_maps="B D_l H W")
@full_precision
def dsd_pixel_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Mean squared error between the residual attention maps of all pairs of layers.

    $$ \frac{1}{|P| B H W} \sum_{(l, m) \in P, i} \lVert R^s_{lm, i} - R^t_{lm, i} \rVert^2, \quad
       R_{lm} = \frac{Q_m - Q_l}{\lVert Q_m - Q_l \rVert}, \quad
       Q_l = \frac{\mathrm{mean}_c F_{l,c}^2}{\lVert \mathrm{mean}_c F_{l,c}^2 \rVert} $$

    P are all pairs of layers l < m.

    Args:
        student_maps: Student maps of at least two layers, each `(B, C_l, H, W)`.
        teacher_maps: Teacher maps of as many layers, each `(B, D_l, H, W)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than two layers or the shapes do not match.

    References:
        Feng et al.: Double Similarity Distillation for Semantic Image Segmentation, TIP 2021 (arXiv 2107.08591),
        pixel-wise similarity distillation.

    Example:
        >>> import torch
        >>> maps = [torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)]
        >>> dsd_pixel_loss(maps, [2 * values for values in maps]).item() < 1e-6
        True
    """
    if len(student_maps) < 2:
        raise ValueError(f"dsd_pixel_loss compares pairs of layers and requires at least two, got {len(student_maps)}")
    pairs = list(zip(_residuals(student_maps), _residuals(teacher_maps), strict=True))
    return total([F.mse_loss(*pair) for pair in pairs]) / len(pairs)


@check_shapes(student_logits="B K H W", teacher_logits="B K H W")
@full_precision
def dsd_category_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Mean squared error between the Gram matrices of the classes.

    $$ \frac{1}{B K^2} \sum_i \lVert P^s_i {P^s_i}^\top - P^t_i {P^t_i}^\top \rVert^2 $$

    The rows of P are the classes: the softmax over the positions of their logits at the temperature, after average
    pooling of windows of 2x2 pixels.

    Args:
        student_logits: Student logits `(B, K, H, W)`.
        teacher_logits: Teacher logits `(B, K, H, W)`.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Feng et al.: Double Similarity Distillation for Semantic Image Segmentation, TIP 2021 (arXiv 2107.08591),
        category-wise similarity distillation. The loss follows the re-implementation of CIRKD (arXiv 2204.06986).

    Example:
        >>> import torch
        >>> logits = torch.rand(2, 3, 4, 4)
        >>> dsd_category_loss(logits + 1, logits).item() < 1e-12
        True
    """
    grams = []
    for logits in (student_logits, teacher_logits):
        pooled = F.avg_pool2d(logits, 2, ceil_mode=True).flatten(2)
        probs = F.softmax(pooled / temperature, dim=2)
        grams.append(probs @ probs.mT)
    return F.mse_loss(grams[0], grams[1])


class DSD(DistillLoss):
    """Double similarity distillation: match changes of attention between layers, and similarities of classes.

    The maps are the features of the layers, followed by the logits. The term `train/dsd_pixel` compares the normalized
    differences of their attention maps (`dsd_pixel_loss`), `train/dsd_category` the Gram matrices of the classes
    (`dsd_category_loss`). The numbers of channels may differ. All maps are interpolated to the size of the largest one
    for the first term, and the smaller logits to the size of the larger ones for the second term.

    Args:
        student_layers: Student layers whose feature maps are compared, at least one, in the order of the network.
        teacher_layers: Teacher layers, one for each student layer.
        pixel_weight: Weight of the attention maps.
        category_weight: Weight of the classes' similarities.
        temperature: Softmax temperature of the classes' maps, greater than 0.

    Raises:
        ValueError: If a weight is negative or the temperature is not greater than 0. At the start of training, if there
            are no layers, or if the logits or a layer's output are not a map.

    References:
        Feng et al.: Double Similarity Distillation for Semantic Image Segmentation, TIP 2021 (arXiv 2107.08591). No
        code of the authors is known; loss, weights (for Cityscapes) and temperature are those of the
        re-implementation of CIRKD (arXiv 2204.06986), which compares auxiliary logits, one feature map and the logits.
    """

    needs_build = False  # `build` only checks the layers

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        pixel_weight: float = 1000.0,
        category_weight: float = 10.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_weights(pixel_weight=pixel_weight, category_weight=category_weight)
        self.pixel_weight = pixel_weight
        self.category_weight = category_weight
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the shapes of the features and the logits."""
        self._maps(student.outputs, teacher.outputs)

    def _maps(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of maps: the features of the layers, and the logits."""
        return [*self.pairs(student, teacher, dims=4), logit_maps(self, student, teacher)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms."""
        pairs = self._maps(student, teacher)
        height, width = (max(values.shape[dim] for pair in pairs for values in pair) for dim in (2, 3))
        student_maps, teacher_maps = (
            [interpolated(feature, (height, width)) for feature in maps] for maps in zip(*pairs, strict=True)
        )
        category = dsd_category_loss(*enlarged(*pairs[-1]), self.temperature)
        return {
            "pixel": self.pixel_weight * dsd_pixel_loss(student_maps, teacher_maps),
            "category": self.category_weight * category,
        }
