"""Logit standardization around another criterion."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._checks import check_classes, check_positive
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import CompositeLoss, DistillLoss
from lkd.losses.multi_teacher import MultiTeacher
from lkd.types import Batch, Outputs


@check_shapes(logits="B K")
def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Logits of each sample with mean 0 and standard deviation 1 over the classes.

    $$ (z - \mathrm{mean}_c z) \, / \, (\mathrm{std}_c z + \epsilon) $$

    Args:
        logits: `(B, K)`.
        eps: Added to the standard deviation, which divides by K - 1.

    Returns:
        `(B, K)`; float32 for logits in half precision, else the logits' type.

    References:
        Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024 (arXiv 2403.01427), which divides the
        variance by K; this is the authors' code.

    Example:
        >>> import torch
        >>> standardize(torch.tensor([[10.0, 20.0, 30.0]])).tolist()
        [[-1.0, 0.0, 1.0]]
    """
    check_classes(logits, 2, "divides by the standard deviation over the classes")
    logits = wide(logits)
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + eps)


class LogitStandardization(CompositeLoss):
    """Any criterion, on logits with mean 0 and standard deviation 1: the student need not match their size.

    Every sample's logits, the student's and the teacher's, are standardised over the classes (`standardize`)
    before the criterion compares them; what it reads besides stays as it is. Curves keep the criterion's name.

    Args:
        criterion: What compares the logits; the paper takes KD with temperature 2, DKD, CTKD or MLKD.
        eps: Added to the standard deviation, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0, there is a `MultiTeacher` in the criterion (it goes around this
            one), or, in training, there are fewer than 2 classes.

    References:
        Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024 (arXiv 2403.01427). The standard
        deviation divides by K - 1, as in the authors' code; in the paper, by K.

    Example:
        >>> from lkd.losses import KD
        >>> LogitStandardization(KD(temperature=2.0)).name
        'kd'
    """

    def __init__(self, criterion: DistillLoss, eps: float = 1e-7) -> None:
        super().__init__([criterion])
        if any(isinstance(part, MultiTeacher) for part in criterion.modules()):
            raise ValueError(
                "LogitStandardization does not reach the single teachers' logits that MultiTeacher compares; nest them "
                "the other way round, MultiTeacher outside"
            )
        check_positive("1e-7 is usual", eps=eps)
        self.criterion = criterion
        self.eps = eps

    @property
    def name(self) -> str:
        """The criterion's."""
        return self.criterion.name

    @property
    def parts(self) -> list[DistillLoss]:
        """The criterion."""
        return [self.criterion]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The criterion's value for the standardised logits."""
        student = self._standardized(student)
        if self.needs_teacher:
            teacher = self._standardized(teacher)
        loss: Tensor | dict[str, Tensor] = self.criterion(student, teacher, batch)
        return loss

    def _standardized(self, outputs: Outputs) -> Outputs:
        return outputs._replace(logits=standardize(outputs.logits, self.eps))
