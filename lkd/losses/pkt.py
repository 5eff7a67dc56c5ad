"""Probabilistic knowledge transfer (PKT)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkd.losses._checks import check_positive
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs


def _neighbor_probabilities(feature: Tensor, eps: float) -> Tensor:
    """Return the conditional neighbor probabilities of the samples `(B, B)`."""
    x = feature.flatten(1)
    x = x / (x.norm(dim=1, keepdim=True) + eps)
    similarity: Tensor = (x @ x.mT + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def pkt_loss(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Divergence between the neighbor probabilities of the samples.

    $$ \frac{1}{B^2} \sum_{ij} p_{t,ij} \log \frac{p_{t,ij} + \epsilon}{p_{s,ij} + \epsilon}, \quad
       p_{ij} = k_{ij} / \sum_j k_{ij}, \; k_{ij} = (\cos(x_i, x_j) + 1) / 2 $$

    Args:
        student_feature: Student feature `(B, C, ...)`; all dimensions except the first are flattened.
        teacher_feature: Teacher feature `(B, D, ...)`.
        eps: Constant added to probabilities and feature norms.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv 1803.10837). The mean over all pairs follows the authors' code; the paper sums.

    Example:
        >>> import torch
        >>> feature = torch.rand(4, 8)
        >>> pkt_loss(3 * feature, feature).abs().item() < 1e-7
        True
    """
    student, teacher = _neighbor_probabilities(student_feature, eps), _neighbor_probabilities(teacher_feature, eps)
    return (teacher * ((teacher + eps).log() - (student + eps).log())).mean()


class PKT(DistillLoss):
    """Probabilistic knowledge transfer: match neighborhoods.

    The loss compares the probabilities that samples are neighbors in feature space (see `pkt_loss`). Feature sizes may
    differ.

    Args:
        student_layers: Student layers whose features are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        eps: Constant added to probabilities and feature norms, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0.

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv 1803.10837). The CIFAR-100 benchmark uses the weight 30000, as the loss is a mean over all pairs.
    """

    reads_logits = False
    compares_samples = True
    per_process = "neighbor probabilities between images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("typically 1e-7", eps=eps)
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `pkt_loss` over the layers."""
        return total([pkt_loss(*pair, self.eps) for pair in self.pairs(student, teacher)])
