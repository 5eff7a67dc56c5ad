"""Simple recipe distillation (SRD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import normalized_linear
from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B D", teacher_feature="B D")
@full_precision
def srd_loss(student_feature: Tensor, teacher_feature: Tensor, exponent: float = 4.0) -> Tensor:
    r"""Logarithm of the summed powers of the differences of two normalised features.

    $$ 2 \log \sum_{i, d} |f_{s, id} - f_{t, id}|^e $$

    The sum runs over the batch too. A sum of 0 counts as the least positive number, and has no gradient.

    Args:
        student_feature: `(B, D)`, projected and normalised.
        teacher_feature: `(B, D)`, normalised.
        exponent: At least 1; a larger one lets the largest differences decide.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024
        (arXiv 2303.11098). The factor 2 is the authors' code.

    Example:
        >>> srd_loss(torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])).item()
        0.0
    """
    distance = (student_feature - teacher_feature).abs().pow(exponent).sum()
    return 2 * distance.clamp_min(torch.finfo(distance.dtype).tiny).log()


class SRD(DistillLoss):
    """The simple recipe for distillation: pooled features, projected and normalised, and logits.

    A linear layer without bias brings the student's feature to the teacher's size, also where it has it; a BatchNorm
    without scale and shift then normalises both. Their difference (`srd_loss`) is added to the divergence of the
    teacher's softened probabilities from the student's, which the square of the temperature does not multiply here.

    Args:
        student_layers: Layers of the student whose pooled features it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        exponent: Power of the differences, at least 1; a larger one lets the largest differences decide.
        temperature: Softens both networks' probabilities, greater than 0.

    Raises:
        ValueError: If the exponent is less than 1 or the temperature not greater than 0, or, in training, a layer
            returns no pooled feature.

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024
        (arXiv 2303.11098). 4 is the exponent of its ImageNet runs; the authors' code has 1 where none is given.
    """

    compares_samples = True
    per_process = "takes the logarithm of the sum over its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        exponent: float = 4.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not 1 <= exponent < math.inf:
            raise ValueError(f"exponent must be at least 1, got {exponent}; take a finite number, 4 is usual")
        self.exponent = exponent
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projectors and the normalisations."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=2)
        self.projectors = nn.ModuleList(
            normalized_linear(ours.shape[1], theirs.shape[1], eps=1e-4, affine=False) for ours, theirs in pairs
        )
        self.teacher_norms = nn.ModuleList(
            nn.BatchNorm1d(theirs.shape[1], eps=1e-4, affine=False) for _, theirs in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`features`, the sum of `srd_loss` over the layers, and `logits`."""
        parts = zip(self.projectors, self.teacher_norms, self.pairs(student, teacher), strict=True)
        losses = [srd_loss(projector(ours), norm(theirs), self.exponent) for projector, norm, (ours, theirs) in parts]
        divergence = softened_kl(student.logits, teacher.logits, self.temperature).mean()
        return {"features": total(losses), "logits": divergence}
