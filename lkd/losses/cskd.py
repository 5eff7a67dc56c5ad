"""Class-wise self-knowledge distillation (CS-KD)."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._labels import labelled_mean
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", partner_logits="B K", target="B")
def cskd_loss(student_logits: Tensor, partner_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Divergence between the student's predictions for two images of the same class.

    $$ \tau^2 \; \frac{1}{B} \sum_i
       \mathrm{KL}(\mathrm{softmax}(z'_i / \tau) \,\|\, \mathrm{softmax}(z_i / \tau)) $$

    The prediction z' for the partner image takes the place of the teacher and receives no gradient.

    Args:
        student_logits: Student logits `(B, K)`.
        partner_logits: Student logits `(B, K)` of other images of the same classes.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Yun et al.: Regularizing Class-wise Predictions via Self-knowledge Distillation, CVPR 2020 (arXiv 2003.13964).
    """
    values = softened_kl(student_logits, partner_logits.detach(), temperature)
    return temperature**2 * labelled_mean(values, target)


class CSKD(DistillLoss):
    """Class-wise self-KD: consistent predictions in a class.

    The criterion reads two views of each image; the second one is another image of the same class
    (`lkd.datamodules.ClassPartner`). A teacher is not needed. Samples without a label are excluded. See `cskd_loss`.

    Args:
        temperature: Softmax temperature, greater than 0; larger values flatten both distributions.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Yun et al.: Regularizing Class-wise Predictions via Self-knowledge Distillation, CVPR 2020 (arXiv 2003.13964).
        The authors' code runs the partner images through the network separately. Here, they share a batch with the
        images, so the BatchNorm statistics include both.
    """

    needs_teacher = False
    reads_logits = False
    num_views = 2
    skips_unlabelled = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `cskd_loss`."""
        logits, partner_logits = student.logits.chunk(2)
        return cskd_loss(logits, partner_logits, batch.target.chunk(2)[0], self.temperature)
