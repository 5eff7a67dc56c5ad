"""Channel-wise distillation (CWD)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkd.losses._adapters import aligners
from lkd.losses._checks import check_temperature
from lkd.losses._dense import enlarged, maps
from lkd.losses._divergence import softened_kl
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_map="B C H W", teacher_map="B C H W")
def cwd_loss(student_map: Tensor, teacher_map: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence between the channels of two maps, each a distribution over the positions.

    $$ \frac{\tau^2}{B C} \sum_{i, c} \mathrm{KL}(\mathrm{softmax}(F_{t,ic} / \tau) \,\|\,
       \mathrm{softmax}(F_{s,ic} / \tau)) $$

    The softmax runs over the H * W positions of a channel, so the loss emphasizes the regions where the teacher's
    channel is most active.

    Args:
        student_map: Student logits or features `(B, C, H, W)`.
        teacher_map: Teacher logits or features `(B, C, H, W)`.
        temperature: Softmax temperature $\tau$, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Shu et al.: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021 (arXiv 2011.13256).

    Example:
        >>> import torch
        >>> teacher = torch.rand(2, 3, 4, 4)
        >>> cwd_loss(teacher + 1, teacher).item() < 1e-6  # a constant does not change the softmax
        True
    """
    student, teacher = (values.flatten(2).flatten(0, 1) for values in (student_map, teacher_map))
    return temperature**2 * softened_kl(student, teacher, temperature).mean()


class CWD(DistillLoss):
    """Channel-wise distillation: match where each channel is active.

    Each channel of a map is converted to a distribution over the positions, and the student matches the teacher's
    distributions (see `cwd_loss`). Without layers, the logits of each class are compared; with layers, their feature
    maps, where a 1x1 convolution without bias maps the student's channels to the teacher's if their numbers differ. The
    losses of the layers are summed. If maps differ in size, the smaller one is interpolated to the size of the larger
    one. Every pixel counts, including those without a label.

    Args:
        student_layers: Student layers whose feature maps are compared; empty for the logits.
        teacher_layers: Teacher layers, one for each student layer; empty for the logits.
        temperature: Softmax temperature, greater than 0.

    Raises:
        ValueError: If the temperature is not greater than 0. At the start of training, if the logits or a layer's
            output are not a map.

    References:
        Shu et al.: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021 (arXiv 2011.13256). The authors
        use the weight 3 and the temperature 4 for logits on Cityscapes, and 50 for features. If the
        numbers of channels differ, their second repository divides by the student's number; this class divides by the
        number of channels that are compared, as in their first one.
    """

    def __init__(
        self, student_layers: Sequence[str] = (), teacher_layers: Sequence[str] = (), temperature: float = 4.0
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.reads_logits = not (self.student_layers or self.teacher_layers)  # type: ignore[misc]  # per instance
        self.needs_build = not self.reads_logits  # type: ignore[misc]  # the logits have no adapters
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the 1x1 convolutions of features with different numbers of channels."""
        pairs = maps(self, student.outputs, teacher.outputs)
        self.aligners = aligners(pairs if self.student_layers else [])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `cwd_loss` over the layers."""
        pairs = maps(self, student, teacher)
        if self.student_layers:
            pairs = [
                (align(student_feature), teacher_feature)
                for align, (student_feature, teacher_feature) in zip(self.aligners, pairs, strict=True)
            ]
        return total([cwd_loss(*enlarged(*pair), self.temperature) for pair in pairs])
