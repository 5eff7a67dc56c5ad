"""Probabilistic knowledge transfer (PKT)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkd.losses._checks import check_positive
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs


def _neighbours(feature: Tensor, eps: float) -> Tensor:
    """How near each sample is to every one, as probabilities `(B, B)`."""
    x = feature.flatten(1)
    x = x / (x.norm(dim=1, keepdim=True) + eps)
    similarity: Tensor = (x @ x.mT + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def pkt_loss(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Divergence between the probabilities with which samples are each other's neighbours.

    $$ \frac{1}{B^2} \sum_{ij} p_{t,ij} \log \frac{p_{t,ij} + \epsilon}{p_{s,ij} + \epsilon}, \quad
       p_{ij} = k_{ij} / \sum_j k_{ij}, \; k_{ij} = (\cos(x_i, x_j) + 1) / 2 $$

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.
        eps: Added to probabilities and to the features' lengths.

    Returns:
        A scalar in nats; float32 for features in half precision, else the features' type.

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv 1803.10837). This is the authors' code, with the mean over all pairs; the paper sums.

    Example:
        >>> import torch
        >>> feature = torch.rand(4, 8)
        >>> pkt_loss(3 * feature, feature).abs().item() < 1e-7
        True
    """
    student, teacher = _neighbours(student_feature, eps), _neighbours(teacher_feature, eps)
    return (teacher * ((teacher + eps).log() - (student + eps).log())).mean()


class PKT(DistillLoss):
    """Probabilistic knowledge transfer: the samples' neighbourhoods are to be the teacher's.

    Args:
        student_layers: Layers of the student whose features it reads, each by itself; the losses are added.
        teacher_layers: The teacher's, as many.
        eps: Added to probabilities and to the features' lengths, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0.

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv 1803.10837). The CIFAR-100 benchmark weighs it with 30000, as it is a mean over all pairs.
    """

    reads_logits = False
    compares_samples = True
    per_process = "finds neighbours among its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("1e-7 is usual", eps=eps)
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `pkt_loss` over the layers."""
        return total([pkt_loss(ours, theirs, self.eps) for ours, theirs in self.pairs(student, teacher)])
