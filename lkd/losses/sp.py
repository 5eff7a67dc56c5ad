"""Similarity-preserving knowledge distillation (SP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs


def _similarities(feature: Tensor) -> Tensor:
    """Return the Gram matrix of the samples with rows normalized to unit length `(B, B)`."""
    x = feature.flatten(1)
    return unit_vectors(x @ x.mT, dim=1)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def sp_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Mean squared error between normalized similarity matrices of the samples.

    $$ \frac{1}{B^2} \lVert \bar{G}_s - \bar{G}_t \rVert_F^2, \quad G = X X^\top, \quad
       \bar{G}_i = G_i / \lVert G_i \rVert \text{ row by row} $$

    Args:
        student_feature: Student feature `(B, C, ...)`; all dimensions except the first are flattened.
        teacher_feature: Teacher feature `(B, D, ...)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv 1907.09682).

    Example:
        >>> import torch
        >>> feature = torch.rand(4, 8, 2, 2)
        >>> sp_loss(3 * feature, feature).item() < 1e-12
        True
    """
    return F.mse_loss(_similarities(student_feature), _similarities(teacher_feature))


class SP(DistillLoss):
    """Similarity-preserving KD: match sample Gram matrices.

    Samples with similar teacher features should have similar student features (see `sp_loss`). Feature sizes may
    differ.

    Args:
        student_layers: Student layers whose features are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv 1907.09682). The CIFAR-100 benchmark
        uses the last stage and the weight 3000.
    """

    reads_logits = False
    compares_samples = True
    per_process = "similarities between images"

    def __init__(
        self, student_layers: Sequence[str] = ("@last_stage",), teacher_layers: Sequence[str] = ("@last_stage",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `sp_loss` over the layers."""
        return total([sp_loss(*pair) for pair in self.pairs(student, teacher)])
