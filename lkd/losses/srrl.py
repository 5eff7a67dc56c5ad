"""Softmax regression representation learning (SRRL)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import projection
from lkd.losses._checks import check_weights
from lkd.losses._classifiers import linear_classifier
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs, Probe


@check_shapes(feature="B D H W", teacher_feature="B D H' W'", teacher_logits="B K")
@full_precision
def _srrl(
    feature: Tensor, teacher_feature: Tensor, teacher_logits: Tensor, head: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    pooled, teacher_pooled = feature.mean((2, 3)), teacher_feature.mean((2, 3))
    logits = F.linear(pooled, *(tensor.detach().to(pooled.dtype) for tensor in head))
    return F.mse_loss(pooled, teacher_pooled), F.mse_loss(logits, teacher_logits)


@check_shapes(feature="B D H W", teacher_feature="B D H' W'", teacher_logits="B K", weight="K D", bias="K")
def srrl_loss(
    feature: Tensor,
    teacher_feature: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    regression_weight: float = 1.0,
) -> Tensor:
    r"""Mean squared differences of the pooled features, and of what the teacher's classifier makes of them.

    $$ \frac{1}{BD} \lVert x - t \rVert^2 + \lambda \frac{1}{BK} \lVert W x + b - z_t \rVert^2, \quad
       x = \mathrm{mean}_{hw} X, \; t = \mathrm{mean}_{hw} T $$

    Args:
        feature: The student's, with as many channels as the teacher's: `(B, D, H, W)`.
        teacher_feature: `(B, D, H', W')`.
        teacher_logits: `(B, K)`.
        weight: The teacher's classifier, `(K, D)`; it gets no gradient.
        bias: Its bias, `(K,)`; None: 0.
        regression_weight: Weight of the second part.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.
    """
    matching, regression = _srrl(feature, teacher_feature, teacher_logits, [weight] if bias is None else [weight, bias])
    return matching + regression_weight * regression


class SRRL(DistillLoss):
    """Softmax regression: the teacher's classifier must get from the student's features what it gets from its own.

    The student's map goes through a connector that trains with it (1x1 convolution, BatchNorm, ReLU), and is averaged
    over the pixels. Its curves are `train/srrl_fm` (feature matching) and `train/srrl_sr` (softmax regression).

    Args:
        student_layer: Layer of the student whose map the pooling reads.
        teacher_layer: The teacher's.
        teacher_head: The teacher's classifier, one linear layer; it stays as it is.
        regression_weight: Weight of the difference of the logits.

    Raises:
        ValueError: If the weight is negative, or, in training, a layer returns no feature map or the classifier is
            another kind of layer.

    References:
        Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021. The mean squared
        difference of the logits is the authors' code's; the paper also tries other losses there.
    """

    reads_logits = False

    def __init__(
        self,
        student_layer: str = "@map",
        teacher_layer: str = "@map",
        teacher_head: str = "@head",
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        check_weights(regression_weight=regression_weight)
        self.teacher_head = teacher_head
        self.regression_weight = regression_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the connector, and find the teacher's classifier."""
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.connector = nn.Sequential(*projection(ours.shape[1], theirs.shape[1]), nn.ReLU())
        # in a tuple, as it stays a part of the teacher
        self._head = (linear_classifier("SRRL", "teacher", teacher, self.teacher_head, theirs.shape[1]),)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The two parts of `srrl_loss`."""
        ((ours, theirs),) = self.pairs(student, teacher)
        head = list(self._head[0].parameters())
        matching, regression = _srrl(self.connector(ours), theirs, teacher.logits, head)
        return {"fm": matching, "sr": self.regression_weight * regression}
