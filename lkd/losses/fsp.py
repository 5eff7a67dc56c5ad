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
    r"""FSP matrix: inner products between the channels of two feature maps, averaged over the pixels.

    $$ G_{ij} = \frac{1}{HW} \sum_{h,w} F_{i,h,w} F'_{j,h,w} $$

    Args:
        bottom: Feature map of the earlier layer `(B, C, H, W)`.
        top: Feature map of the later layer `(B, D, H', W')`.
        pooling: Pooling of the larger map to the size of the smaller one.

    Returns:
        FSP matrices `(B, C, D)` (float32 for half-precision inputs).

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
    r"""Squared difference of the FSP matrices between consecutive layers.

    $$ \sum_l \frac{1}{B} \sum_i \lVert G(F_{s,l,i}, F_{s,l+1,i}) - G(F_{t,l,i}, F_{t,l+1,i}) \rVert_F^2 $$

    The matrices G are those of `fsp_matrix`.

    Args:
        student_features: Student feature maps `(B, C_l, H_l, W_l)` of at least two layers l.
        teacher_features: Teacher feature maps `(B, C_l, H'_l, W'_l)` of the same number of layers.
        pooling: Pooling of the larger of two maps to the size of the smaller one.
        reduction: `sum` over the entries of a matrix (squared Frobenius norm), or their `mean`, which does not grow
            with the number of channels.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than two layers or the shapes do not match.

    References:
        Yim et al.: A Gift from Knowledge Distillation, CVPR 2017. The CIFAR-100 benchmark (Tian et al., arXiv
        1910.10699) uses `mean` for `pooling` and `reduction`. torchdistill sums the norms of the columns of the
        difference, whereas the paper squares the differences; this variant is not implemented.

    Example:
        >>> import torch
        >>> features = [torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)]
        >>> fsp_loss(features, [2 * features[0], features[1]]).item()
        6.0
    """
    check_layers("fsp_loss", student_features)
    losses = []
    for student_pair, teacher_pair in zip(pairwise(student_features), pairwise(teacher_features), strict=True):
        squares = (fsp_matrix(*student_pair, pooling) - fsp_matrix(*teacher_pair, pooling)).square()
        losses.append(squares.mean() if reduction == "mean" else squares.sum() / len(squares))
    return total(losses)


class FSP(FlowLoss):
    """Flow of solution procedure: inter-layer Gram matrices.

    The matrices contain the inner products between the channels of consecutive layers (see `fsp_loss`). The method is
    intended as the only loss of the first epochs: see `configs/methods/fsp.yaml`.

    Args:
        student_layers: Student layers whose feature maps are compared, at least two, in the order of the network.
        teacher_layers: Teacher layers, one for each student layer, with the same numbers of channels.
        pooling: Pooling of the larger of two maps to the size of the smaller one; the paper uses `max`.
        reduction: `sum` over the entries of a matrix, as in the paper, or `mean`.
        connect: Whether a 1x1 convolution with BatchNorm adapts student maps to the teacher's number of channels, where
            the numbers differ; the paper has no such adapter.

    Raises:
        ValueError: At the start of training, if there are fewer than two layers, if a layer does not return a feature
            map, or if the numbers of channels differ and `connect` is false.

    References:
        Yim et al.: A Gift from Knowledge Distillation, CVPR 2017. The CIFAR-100 benchmark uses `mean` for `pooling` and
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
        """Compute `fsp_loss`."""
        return fsp_loss(*self.connected(student, teacher), pooling=self.pooling, reduction=self.reduction)
