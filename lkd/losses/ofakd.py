"""One-for-all knowledge distillation (OFA-KD) between different architectures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lkd.losses._checks import check_positive, check_temperature, check_weights
from lkd.losses._labels import own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax, softmax
from lkd.losses.base import DistillLoss, read_layers, total
from lkd.types import IGNORE_INDEX, Batch, Outputs, Probe


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy with the teacher's probabilities, with increased weight on the target class.

    $$ - \frac{1}{B} \sum_{ic} \big( (p_{ic} + y_{ic})^\epsilon - y_{ic} \big) \log q_{ic}, \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau) $$

    Here y is 1 for the target class and 0 for all others. With $\epsilon = 1$ the loss is the cross-entropy between
    teacher and student. Larger values increase the weight of the target class and decrease the weight of the others.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; for samples with `IGNORE_INDEX`, y is 0 for all classes.
        eps: Exponent, greater than 0; gamma in the paper.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation,
        NeurIPS 2023 (arXiv 2310.19444). Neither the paper nor the code has a factor temperature².

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> [round(ofa_loss(logits, logits, target, eps).item(), 4) for eps in (1.0, 1.5)]
        [0.6656, 0.4884]
    """
    log_student = log_softmax(wide(student_logits) / temperature)
    teacher = softmax(wide(teacher_logits) / temperature)
    classes = torch.arange(teacher.shape[1], device=target.device)
    labelled = (target != IGNORE_INDEX).unsqueeze(1)
    is_target = ((own_class(target, student_logits) == classes) & labelled).to(teacher.dtype)
    return -(((teacher + is_target) ** eps - is_target) * log_student).sum(1).mean()


def _exit(feature: Tensor, num_classes: int, num_halvings: int) -> nn.Module:
    """Create the exit branch that maps a feature of one stage to logits."""
    if feature.ndim == 4:
        channels = [feature.shape[1] * 2**number for number in range(num_halvings + 1)]
        halvings = [layer for pair in pairwise(channels) for layer in _halving(*pair)]
        return nn.Sequential(*halvings, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))
    if feature.ndim == 3:
        return _TokenExit(feature.shape[2], num_classes)
    raise ValueError(
        f"OFAKD requires feature maps (B, C, H, W) or tokens (B, N, C), but a student layer returns "
        f"{tuple(feature.shape)}; set other student_layers"
    )


def _halving(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class _TokenExit(nn.Module):
    """Transformer block followed by a linear layer on the mean of the tokens."""

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
    """One-for-all KD: match logits at exits of every stage.

    Features of different architectures are hard to compare, but logits are not. Each stage gets an exit branch, which
    is trained with the student and discarded afterwards. For feature maps, an exit consists of separable convolutions,
    which halve the size once for each following stage, global average pooling and a linear layer. For tokens, it
    consists of a transformer block, the mean over the tokens and a linear layer. The terms are logged as
    `train/ofakd_exits` and `train/ofakd_logits`.

    Args:
        student_layers: Student layers with an exit; they return feature maps or tokens. For a transformer, name a few
            blocks, for example at a quarter, half, three quarters and the end of its depth.
        eps: Exponent, greater than 0; gamma in the paper. The authors use values from 1 to 1.5.
        temperature: Softmax temperature, greater than 0.
        exits_weight: Weight of the sum over the exits.
        logits_weight: Weight of the loss of the student's final logits.

    Raises:
        ValueError: If a weight is negative, or if `eps` or the temperature is not greater than 0. At the start of
            training, if a layer returns neither a feature map nor tokens.

    References:
        Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation, NeurIPS
        2023 (arXiv 2310.19444). The exits are simpler than the authors', who project all features to the width of the
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
        check_positive("typically 1 to 1.5", eps=eps)
        check_weights(exits_weight=exits_weight, logits_weight=logits_weight)
        self.eps = eps
        self.temperature = check_temperature(temperature)
        self.exits_weight = exits_weight
        self.logits_weight = logits_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the exits."""
        features = read_layers(student.outputs, self.student_layers)
        num_classes = student.outputs.logits.shape[1]
        self.exits = nn.ModuleList(
            _exit(feature, num_classes, len(features) - number) for number, feature in enumerate(features, start=1)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute `ofa_loss` for the exits and for the student's logits."""
        outputs = [out(student.features[layer]) for out, layer in zip(self.exits, self.student_layers, strict=True)]
        exits, own = (
            [ofa_loss(logits, teacher.logits, batch.target, self.eps, self.temperature) for logits in group]
            for group in (outputs, [student.logits])
        )
        return {"exits": self.exits_weight * total(exits), "logits": self.logits_weight * own[0]}
