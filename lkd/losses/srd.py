"""Simple recipe distillation (SRD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, normalized_linear
from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B D", teacher_feature="B D")
@full_precision
def srd_loss(student_feature: Tensor, teacher_feature: Tensor, exponent: float = 4.0) -> Tensor:
    r"""Logarithm of the sum of powers of feature differences.

    $$ 2 \log \sum_{i, d} |f_{s, id} - f_{t, id}|^e $$

    The sum includes the batch dimension. A sum of 0 is replaced by the smallest positive number and has no gradient.

    Args:
        student_feature: Projected and normalized student feature `(B, D)`.
        teacher_feature: Normalized teacher feature `(B, D)`.
        exponent: Exponent e, at least 1; larger values emphasize the largest differences.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024
        (arXiv 2303.11098). The factor 2 follows the authors' code.

    Example:
        >>> srd_loss(torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])).item()
        0.0
    """
    distance = (student_feature - teacher_feature).abs().pow(exponent).sum()
    return 2 * distance.clamp_min(torch.finfo(distance.dtype).tiny).log()


class SRD(DistillLoss):
    """Simple recipe: match normalized features and logits.

    A linear layer without bias maps the student's feature to the size of the teacher's, even if the sizes are equal. A
    BatchNorm without scale and shift normalizes both features before they are compared (`srd_loss`). The loss adds the
    divergence between the softened probabilities, without the usual factor temperature².

    Args:
        student_layers: Student layers whose pooled features are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        exponent: Exponent of the differences, at least 1; larger values emphasize the largest differences.
        temperature: Softmax temperature, greater than 0.

    Raises:
        ValueError: If `exponent` is less than 1 or the temperature is not greater than 0. At the start of training, if
            a layer does not return a pooled feature.

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024
        (arXiv 2303.11098). The defaults are those of the authors' code for ImageNet, which multiplies the divergence
        by temperature² with the temperature fixed at 1. In torchdistill, the default exponent is 1, and the factor is
        absent.
    """

    compares_samples = True
    per_process = "logarithm of the sum over images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        exponent: float = 4.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not 1 <= exponent < math.inf:
            raise ValueError(f"exponent must be at least 1, got {exponent}; typically 4")
        self.exponent = exponent
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the projectors and the normalization layers."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=2)
        self.projectors = nn.ModuleList(
            normalized_linear(*sizes, eps=1e-4, affine=False) for sizes in channel_pairs(pairs)
        )
        self.teacher_norms = nn.ModuleList(
            nn.BatchNorm1d(teacher_feature.shape[1], eps=1e-4, affine=False) for _, teacher_feature in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute `features`, the sum of `srd_loss` over the layers, and `logits`."""
        parts = zip(self.projectors, self.teacher_norms, self.pairs(student, teacher), strict=True)
        losses = [
            srd_loss(projector(student_feature), norm(teacher_feature), self.exponent)
            for projector, norm, (student_feature, teacher_feature) in parts
        ]
        divergence = softened_kl(student.logits, teacher.logits, self.temperature).mean()
        return {"features": total(losses), "logits": divergence}
