"""Flow of solution procedure (FSP)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from lkd.losses._adapters import Pooling, same_size
from lkd.losses._flow import FlowLoss, check_layers
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import total
from lkd.types import Batch, Outputs


@check_shapes(bottom="B C H W", top="B D H' W'")
@full_precision
def fsp_matrix(bottom: Tensor, top: Tensor, pooling: Pooling = "max") -> Tensor:
    r"""Inner products of the channels of two layers' feature maps, the mean over the pixels.

    $$ G_{ij} = \frac{1}{HW} \sum_{h,w} F_{i,h,w} F'_{j,h,w} $$

    Args:
        bottom: `(B, C, H, W)`.
        top: `(B, D, H', W')`, of a later layer.
        pooling: How the larger map is brought to the smaller one's size.

    Returns:
        `(B, C, D)`; float32 for features in half precision, else the features' type.

    References:
        Yim et al.: A Gift from Knowledge Distillation, CVPR 2017, equation 1.
    """
    bottom, top = (feature.flatten(2) for feature in same_size(bottom, top, pooling))
    return bottom @ top.mT / bottom.shape[2]


@check_shapes(student_features="B C_l H_l W_l", teacher_features="B C_l H'_l W'_l")
@full_precision
def fsp_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    pooling: Pooling = "max",
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""Squared differences of the flow matrices between each layer and the next.

    $$ \sum_l \frac{1}{B} \sum_i \lVert G(F_{s,l,i}, F_{s,l+1,i}) - G(F_{t,l,i}, F_{t,l+1,i}) \rVert_F^2 $$

    with G as in `fsp_matrix`.

    Args:
        student_features: `(B, C_l, H_l, W_l)` for each layer l, at least two layers.
        teacher_features: `(B, C_l, H'_l, W'_l)` for each layer l, as many layers.
        pooling: How the larger of two maps is brought to the smaller one's size.
        reduction: `sum`: over a matrix's entries, the squared Frobenius norm; `mean`: their mean, so that the loss does
            not grow with the channels.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    Raises:
        ValueError: If there are fewer than two layers, or the shapes do not agree.

    References:
        Yim et al.: A Gift from Knowledge Distillation, CVPR 2017. The CIFAR-100 benchmark (Tian et al., arXiv
        1910.10699) has `mean` for both. torchdistill adds the lengths of the columns of the matrices' difference, not
        squared, where the paper squares: this is not offered.

    Example:
        >>> import torch
        >>> features = [torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)]
        >>> fsp_loss(features, [2 * features[0], features[1]]).item()
        6.0
    """
    check_layers("fsp_loss", student_features)
    losses = []
    for ours, theirs in zip(pairwise(student_features), pairwise(teacher_features), strict=True):
        squares = (fsp_matrix(*ours, pooling) - fsp_matrix(*theirs, pooling)).square()
        losses.append(squares.mean() if reduction == "mean" else squares.sum() / len(squares))
    return total(losses)


class FSP(FlowLoss):
    """Flow of the solution procedure: how the channels of a layer and those of the next are active together.

    It is meant for the first epochs, in which it is the only loss: see `configs/methods/fsp.yaml`.

    Args:
        student_layers: Layers of the student whose feature maps it reads, two at least, in their order.
        teacher_layers: The teacher's, as many, with as many channels.
        pooling: How the larger of two maps is brought to the smaller one's size: `max` in the paper.
        reduction: `sum` over a matrix's entries, as in the paper, or `mean`.
        connect: Whether, where channels differ, the student's map goes through a 1x1 convolution with BatchNorm; the
            paper has none.

    Raises:
        ValueError: In training, if there are fewer than two layers, a layer returns no feature map, or channels differ
            and `connect` is false.

    References:
        Yim et al.: A Gift from Knowledge Distillation, CVPR 2017. The CIFAR-100 benchmark has `mean` for `pooling` and
        `reduction`.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stem", "@stages"),
        teacher_layers: Sequence[str] = ("@stem", "@stages"),
        pooling: Pooling = "max",
        reduction: Literal["sum", "mean"] = "sum",
        connect: bool = False,
    ) -> None:
        super().__init__(student_layers, teacher_layers, connect)
        self.pooling = pooling
        self.reduction = reduction

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `fsp_loss`."""
        return fsp_loss(*self.connected(student, teacher), pooling=self.pooling, reduction=self.reduction)
