"""Logit standardization for another criterion."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._checks import check_classes, check_positive
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.losses.composite import WrapperLoss
from lkd.losses.multi_teacher import MultiTeacher
from lkd.types import Batch, Outputs


@check_shapes(logits="B K")
def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Standardize the logits of each sample to mean 0 and standard deviation 1.

    $$ (z - \mathrm{mean}_c z) \, / \, (\mathrm{std}_c z + \epsilon) $$

    Args:
        logits: Logits `(B, K)`.
        eps: Constant added to the standard deviation. The standard deviation divides by K - 1.

    Returns:
        Standardized logits `(B, K)` (float32 for half-precision inputs).

    References:
        Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024 (arXiv 2403.01427). The paper divides the
        variance by K; dividing by K - 1 follows the authors' code.

    Example:
        >>> import torch
        >>> standardize(torch.tensor([[10.0, 20.0, 30.0]])).tolist()
        [[-1.0, 0.0, 1.0]]
    """
    check_classes(logits, 2, "divides by the standard deviation over the classes")
    logits = wide(logits)
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + eps)


class LogitStandardization(WrapperLoss):
    """Apply any logit criterion to standardized logits.

    The logits of student and teacher are standardized over the classes (`standardize`) before the criterion compares
    them, so the student need not match the magnitude of the teacher's logits. Other inputs of the criterion are
    unchanged. Terms are logged under the name of the criterion.

    Args:
        criterion: Criterion that compares logits. The paper uses KD, CTKD, DKD and MLKD. The default temperature of the
            authors' code is 2 (for MLKD, the first of its temperatures).
        eps: Constant added to the standard deviation, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0, or if the criterion contains a `MultiTeacher` (use `MultiTeacher` as
            the outer criterion). In `forward`, if there are fewer than 2 classes.

    References:
        Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024 (arXiv 2403.01427). The paper divides the
        variance by K; dividing by K - 1 follows the authors' code.

    Example:
        >>> from lkd.losses import KD
        >>> LogitStandardization(KD(temperature=2.0)).name
        'kd'
    """

    def __init__(self, criterion: DistillLoss, eps: float = 1e-7) -> None:
        super().__init__(criterion)
        if any(isinstance(part, MultiTeacher) for part in criterion.modules()):
            raise ValueError(
                "LogitStandardization cannot standardize the logits of the members inside MultiTeacher; use "
                "MultiTeacher as the outer criterion"
            )
        check_positive("typically 1e-7", eps=eps)
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Evaluate the inner criterion on standardized logits."""
        student = self._standardized(student)
        if self.needs_teacher:
            teacher = self._standardized(teacher)
        loss: Tensor | dict[str, Tensor] = self.criterion(student, teacher, batch)
        return loss

    def _standardized(self, outputs: Outputs) -> Outputs:
        return outputs._replace(logits=standardize(outputs.logits, self.eps))
