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
    r"""Mean squared errors of pooled features and of the teacher classifier's logits for them.

    $$ \frac{1}{BD} \lVert x - t \rVert^2 + \lambda \frac{1}{BK} \lVert W x + b - z_t \rVert^2, \quad
       x = \mathrm{mean}_{hw} X, \; t = \mathrm{mean}_{hw} T $$

    Args:
        feature: Student feature map with the channels of the teacher `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H', W')`.
        teacher_logits: Teacher logits `(B, K)`.
        weight: Weight of the teacher's classifier `(K, D)`; it receives no gradient.
        bias: Bias of the teacher's classifier `(K,)`; `None` for no bias.
        regression_weight: Weight of the second term.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.
    """
    matching, regression = _srrl(feature, teacher_feature, teacher_logits, [weight] if bias is None else [weight, bias])
    return matching + regression_weight * regression


class SRRL(DistillLoss):
    """Softmax regression: reuse the teacher's classifier.

    The student's feature map passes through a connector that is trained with the student (1x1 convolution, BatchNorm,
    ReLU) and is averaged over the pixels. The pooled feature is compared with the teacher's (feature matching, logged
    as `train/srrl_fm`), and so are the logits of the teacher's classifier for it (softmax regression, logged as
    `train/srrl_sr`).

    Args:
        student_layer: Student layer that returns the feature map before global pooling.
        teacher_layer: Teacher layer that returns the feature map before global pooling.
        teacher_head: Classifier of the teacher, a single linear layer; it is not trained.
        regression_weight: Weight of the logit term, at least 0.

    Raises:
        ValueError: If the weight is negative. At the start of training, if a layer does not return a feature map or the
            classifier is not a single linear layer.

    References:
        Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021. The mean squared
        error between the logits follows the authors' code; the paper also evaluates other losses.
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
        """Create the connector and find the teacher's classifier."""
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.connector = nn.Sequential(*projection(student_feature.shape[1], teacher_feature.shape[1]), nn.ReLU())
        # a tuple, so that it is not registered as a submodule
        self._head = (linear_classifier("SRRL", "teacher", teacher, self.teacher_head, teacher_feature.shape[1]),)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms of `srrl_loss`."""
        ((student_feature, teacher_feature),) = self.pairs(student, teacher)
        head = list(self._head[0].parameters())
        matching, regression = _srrl(self.connector(student_feature), teacher_feature, teacher.logits, head)
        return {"fm": matching, "sr": self.regression_weight * regression}
