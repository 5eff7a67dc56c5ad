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
    r"""How far the student's neurons are from being active where the teacher's are, and nowhere else.

    $$ \frac{1}{B} \sum_{i,c,h,w} \begin{cases} \max(m - s, 0)^2 & t > 0 \\ \max(m + s, 0)^2 & t \le 0 \end{cases} $$

    with the features s of the student and t of the teacher before their activation. Only the sign of t counts. The
    larger map is averaged to the smaller one's size first.

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, C, H', W')`.
        margin: By how much a neuron is to be beyond the boundary, greater than 0.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

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
    missing = margin - torch.where(teacher.isnan(), teacher, wanted)  # else it would pass for an inactive neuron
    return F.relu(missing).square().sum() / len(student)


class AB(ConnectedLoss):
    """Activation boundaries: the student's neurons are to be active where the teacher's are.

    The features are those before the activation; the student's go through a 1x1 convolution with BatchNorm. It is meant
    for the first epochs, in which it is the only loss: see `configs/methods/ab.yaml`.

    Args:
        student_layers: Layers of the student whose feature maps it reads.
        teacher_layers: The teacher's, as many.
        margin: By how much a neuron is to be beyond the boundary, greater than 0.
        layer_weights: What the layers weigh: `equal`: 1; `doubling`: each twice as much as the one before it, the last
            one 1; or a number for each.

    Raises:
        ValueError: If `margin` is not greater than 0, a weight is negative, or, in training, a layer returns no feature
            map, or the weights are not as many as the layers.

    References:
        Heo et al.: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019
        (arXiv 1811.03233). The CIFAR-100 benchmark (Tian et al., arXiv 1910.10699) has `layer_weights: doubling` and
        the factor 3/1000 inside the loss, and a connector (of other kernel sizes) only where the shapes differ.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = ("@preacts",),
        teacher_layers: Sequence[str] = ("@preacts",),
        margin: float = 1.0,
        layer_weights: LayerWeights = "equal",
    ) -> None:
        super().__init__(student_layers, teacher_layers, layer_weights)
        check_positive("1 is usual", margin=margin)
        self.margin = margin

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The weighted sum of `ab_loss` over the layers."""
        pairs = self.connected(student, teacher)
        return self.weighted_total([ab_loss(ours, theirs, self.margin) for ours, theirs in pairs])
