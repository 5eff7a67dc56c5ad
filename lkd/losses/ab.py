"""Activation boundaries (AB)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._adapters import same_size
from lkd.losses._checks import check_positive
from lkd.losses._connectors import ConnectedLoss, LayerWeights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.types import Batch, Outputs


@check_shapes(student_feature="B C H W", teacher_feature="B C H' W'")
@full_precision
def ab_loss(student_feature: Tensor, teacher_feature: Tensor, margin: float = 1.0) -> Tensor:
    r"""Squared hinge loss between student features and the teacher's activation boundaries.

    $$ \frac{1}{B} \sum_{i,c,h,w} \begin{cases} \max(m - s, 0)^2 & t > 0 \\ \max(m + s, 0)^2 & t \le 0 \end{cases} $$

    Here s and t are the pre-activation features of student and teacher; only the sign of t matters. The larger map is
    average-pooled to the size of the smaller one first.

    Args:
        student_feature: Student pre-activations `(B, C, H, W)`.
        teacher_feature: Teacher pre-activations `(B, C, H', W')`.
        margin: Required distance m from the boundary, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Heo et al.: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019
        (arXiv 1811.03233).

    Example:
        >>> student, teacher = torch.tensor([0.5, 0.5, 2.0, -2.0]), torch.tensor([9.0, -9.0, 1.0, -1.0])
        >>> ab_loss(student.view(1, 1, 2, 2), teacher.view(1, 1, 2, 2), margin=1.0).item()
        2.5
    """
    student, teacher = same_size(student_feature, teacher_feature)
    wanted = torch.where(teacher > 0, student, -student)
    missing = margin - torch.where(teacher.isnan(), teacher, wanted)  # NaN > 0 is False
    return F.relu(missing).square().sum() / len(student)


class AB(ConnectedLoss):
    """Activation boundaries: match signs of pre-activations.

    The student's neurons learn to be active where the teacher's are (see `ab_loss`). The student's pre-activations pass
    through a 1x1 convolution with BatchNorm. The method is intended as the only loss of the first epochs: see
    `configs/methods/ab.yaml`.

    Args:
        student_layers: Student layers whose pre-activation feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.
        margin: Required distance from the boundary, greater than 0.
        layer_weights: Weights of the layers: `equal` (all 1), `doubling` (each twice the preceding one, the last one
            1), or one number for each layer.

    Raises:
        ValueError: If `margin` is not greater than 0 or a weight is negative. At the start of training, if a layer does
            not return a feature map or the number of weights differs from the number of layers.

    References:
        Heo et al.: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019
        (arXiv 1811.03233). The CIFAR-100 benchmark (Tian et al., arXiv 1910.10699) uses `layer_weights: doubling`, a
        factor 3/1000 inside the loss, and a connector (with other kernel sizes) only where the shapes differ.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = ("@preacts",),
        teacher_layers: Sequence[str] = ("@preacts",),
        margin: float = 1.0,
        layer_weights: LayerWeights = "equal",
    ) -> None:
        super().__init__(student_layers, teacher_layers, layer_weights)
        check_positive("typically 1", margin=margin)
        self.margin = margin

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the weighted sum of `ab_loss` over the layers."""
        pairs = self.connected(student, teacher)
        return self.weighted_total([ab_loss(*pair, self.margin) for pair in pairs])
