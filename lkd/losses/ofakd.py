"""One-for-all knowledge distillation (OFA-KD) between different architectures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._checks import check_positive, check_temperature, check_weights
from lkd.losses._labels import own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, read_layers, total
from lkd.types import IGNORE_INDEX, Batch, Outputs, Probe


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy with the teacher's probabilities, in which the target's counts for more.

    $$ - \frac{1}{B} \sum_{ic} \big( (p_{ic} + y_{ic})^\epsilon - y_{ic} \big) \log q_{ic}, \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau) $$

    y is 1 for the target and 0 for other classes. With $\epsilon = 1$ it is the cross-entropy of teacher and student;
    with a larger one, the target weighs more, and the other classes less.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; for an image without a label (`IGNORE_INDEX`), y is 0 for all classes.
        eps: The exponent, greater than 0; gamma in the paper.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation,
        NeurIPS 2023 (arXiv 2310.19444). Neither paper nor code has a factor temperature².

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> [round(ofa_loss(logits, logits, target, eps).item(), 4) for eps in (1.0, 1.5)]
        [0.6656, 0.4884]
    """
    log_student = F.log_softmax(wide(student_logits) / temperature, dim=1)
    teacher = F.softmax(wide(teacher_logits) / temperature, dim=1)
    classes = torch.arange(teacher.shape[1], device=target.device)
    labelled = (target != IGNORE_INDEX).unsqueeze(1)
    is_target = ((own_class(target, student_logits) == classes) & labelled).to(teacher.dtype)
    return -(((teacher + is_target) ** eps - is_target) * log_student).sum(1).mean()


def _exit(feature: Tensor, num_classes: int, num_halvings: int) -> nn.Module:
    """What makes logits of one stage's feature."""
    if feature.ndim == 4:
        channels = [feature.shape[1] * 2**number for number in range(num_halvings + 1)]
        halvings = [layer for pair in pairwise(channels) for layer in _halving(*pair)]
        return nn.Sequential(*halvings, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))
    if feature.ndim == 3:
        return _TokenExit(feature.shape[2], num_classes)
    raise ValueError(
        f"OFAKD reads feature maps (B, C, H, W) or tokens (B, N, C) of the student; a layer returns "
        f"{tuple(feature.shape)}: name other student_layers"
    )


def _halving(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class _TokenExit(nn.Module):
    """A transformer's block, and a linear layer on the mean of the tokens."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        num_heads = 4 if width % 4 == 0 else 1
        self.block = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.linear = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.block(tokens).mean(1))
        return logits


class OFAKD(DistillLoss):
    """One for all: stages of the student get exits that answer, and all of them are compared with the teacher's logits.

    Features of unlike networks have little in common; their logits have. An exit trains with the student and is left
    out afterwards: for a map, separable convolutions that halve its size once for each stage that follows, then the
    mean over the pixels and a linear layer; for tokens, a transformer's block, then the mean over the tokens and a
    linear layer. Its curves are `train/ofakd_exits` and `train/ofakd_logits`.

    Args:
        student_layers: Layers of the student that get an exit: maps with the channels first, or tokens. Of a
            transformer, name a few blocks, at a quarter, half, three quarters and the whole of its depth, say.
        eps: The exponent, greater than 0; 1 to 1.5 in the authors' runs.
        temperature: Greater than 0.
        exits_weight: Weight of the sum over the exits.
        logits_weight: Weight of the comparison of the student's own logits.

    Raises:
        ValueError: If a weight is negative, `eps` or the temperature is not greater than 0, or, in training, a layer
            returns neither maps nor tokens.

    References:
        Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation,
        NeurIPS 2023 (arXiv 2310.19444). The exits here are simpler than the authors', who bring all to the width of the
        wider network and merge patches.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        eps: float = 1.0,
        temperature: float = 1.0,
        exits_weight: float = 1.0,
        logits_weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers)
        check_positive("1 to 1.5 is usual", eps=eps)
        check_weights(exits_weight=exits_weight, logits_weight=logits_weight)
        self.eps = eps
        self.temperature = check_temperature(temperature)
        self.exits_weight = exits_weight
        self.logits_weight = logits_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the exits."""
        features = read_layers(student.outputs, self.student_layers)
        num_classes = student.outputs.logits.shape[1]
        self.exits = nn.ModuleList(
            _exit(feature, num_classes, len(features) - number) for number, feature in enumerate(features, start=1)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`ofa_loss` of the exits and of the student's logits."""
        answers = [out(student.features[layer]) for out, layer in zip(self.exits, self.student_layers, strict=True)]
        exits, own = (
            [ofa_loss(logits, teacher.logits, batch.target, self.eps, self.temperature) for logits in group]
            for group in (answers, [student.logits])
        )
        return {"exits": self.exits_weight * total(exits), "logits": self.logits_weight * own[0]}
