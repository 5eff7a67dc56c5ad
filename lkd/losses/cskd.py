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
    r"""Hinton's loss with the student's own answer to another image of the same class in the teacher's place.

    $$ \tau^2 \; \frac{1}{B} \sum_i
       \mathrm{KL}(\mathrm{softmax}(z'_i / \tau) \,\|\, \mathrm{softmax}(z_i / \tau)) $$

    No gradient reaches the partner's logits z'.

    Args:
        student_logits: `(B, K)`.
        partner_logits: `(B, K)`, what the student says of images of the same classes.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Yun et al.: Regularizing Class-wise Predictions via Self-knowledge Distillation, CVPR 2020 (arXiv 2003.13964).
    """
    values = softened_kl(student_logits, partner_logits.detach(), temperature)
    return temperature**2 * labelled_mean(values, target)


class CSKD(DistillLoss):
    """Class-wise self-distillation: images of one class are to get the same answer.

    It reads two views of each image, the second another image of its class (`lkd.datamodules.ClassPartner`). The
    teacher's answers are not used, nor images without a label.

    Args:
        temperature: Greater than 0; a larger one flattens both distributions.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Yun et al.: Regularizing Class-wise Predictions via Self-knowledge Distillation, CVPR 2020 (arXiv 2003.13964).
        In the authors' code the partners pass the network by themselves; here they are in one batch with the images,
        and BatchNorm sees both.
    """

    needs_teacher = False
    reads_logits = False
    num_views = 2
    skips_unlabelled = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `cskd_loss`."""
        logits, partner_logits = student.logits.chunk(2)
        return cskd_loss(logits, partner_logits, batch.target.chunk(2)[0], self.temperature)
