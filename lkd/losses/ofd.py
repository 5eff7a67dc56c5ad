"""Overhaul of feature distillation (OFD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd._compat import AnyBatchNorm
from lkd.features.layers import resolve_layers
from lkd.losses._adapters import pooled_to
from lkd.losses._connectors import ConnectedLoss, LayerWeights
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


@check_shapes(weight="C", bias="C")
def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""Expected negative pre-activation after a BatchNorm layer, for each channel.

    $$ m = \mathrm{E}[x \mid x < 0] = \beta - \sigma \, \varphi(-\beta / \sigma) \, / \, \Phi(-\beta / \sigma), \quad
       x \sim \mathcal{N}(\beta, \sigma^2), \; \sigma = |\gamma| $$

    For channels that are almost never negative, $\Phi(-\beta / \sigma) \le 0.001$, the margin is $-3 \sigma$.

    Args:
        weight: Weight gamma of the BatchNorm `(C,)`.
        bias: Bias beta of the BatchNorm `(C,)`.

    Returns:
        Margins `(C,)`, at most 0.

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019 (arXiv 1904.01866). The exception for
        channels that are almost never negative follows the authors' code.

    Example:
        >>> ofd_margin(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 9.0, -2.0]))
        tensor([-0.7979, -3.0000, -2.0000])
    """
    weight, bias = wide(weight), wide(bias)
    deviation = weight.abs()
    bound = -bias / deviation.clamp(min=torch.finfo(weight.dtype).tiny)  # 0 or infinite for a constant channel
    share = torch.special.ndtr(bound)
    density = torch.exp(-bound.square() / 2) / math.sqrt(2 * math.pi)
    mean = bias - deviation * density / share.clamp(min=0.001)
    return torch.where(share > 0.001, mean, -3 * deviation)


@check_shapes(student_feature="B C H W", teacher_feature="B C H' W'", margin="C")
@full_precision
def ofd_loss(student_feature: Tensor, teacher_feature: Tensor, margin: Tensor) -> Tensor:
    r"""Partial squared distance to the teacher's feature after a margin ReLU.

    $$ \frac{1}{B} \sum_{i,c,h,w} \begin{cases} 0 & s \le \max(t, m_c) \text{ and } t \le 0 \\
       (s - \max(t, m_c))^2 & \text{else} \end{cases} $$

    Here s and t are the pre-activation features of student and teacher. Where t is negative, any smaller value of the
    student is sufficient. The teacher's map is average-pooled to the size of the student's first.

    Args:
        student_feature: Student pre-activations `(B, C, H, W)`.
        teacher_feature: Teacher pre-activations `(B, C, H', W')`.
        margin: Lower bound of the target for each channel `(C,)`, see `ofd_margin`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019 (arXiv 1904.01866).

    Example:
        >>> student, teacher = torch.tensor([3.0, -3.0, 1.0, 1.0]), torch.tensor([1.0, -1.0, -9.0, -0.5])
        >>> ofd_loss(student.view(1, 1, 2, 2), teacher.view(1, 1, 2, 2), torch.tensor([-1.0])).item()
        10.25
    """
    teacher = pooled_to(teacher_feature, (student_feature.shape[2], student_feature.shape[3]))
    target = torch.maximum(teacher, margin.view(1, -1, 1, 1))
    is_enough = (student_feature <= target) & (teacher <= 0)
    return (student_feature - target).masked_fill(is_enough, 0.0).square().sum() / len(student_feature)


class OFD(ConnectedLoss):
    """Overhaul of feature distillation: margin ReLU features.

    The criterion compares pre-activation features by a partial distance (see `ofd_loss`). The student's features pass
    through a 1x1 convolution with BatchNorm. The margins are computed from the parameters of the teacher's BatchNorm
    layers.

    Args:
        student_layers: Student layers whose pre-activation feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.
        teacher_norms: BatchNorm layers that produce the teacher's features, one for each teacher layer.
        layer_weights: Weights of the layers: `equal` (all 1), `doubling` (each twice the preceding one, the last one
            1), or one number for each layer.

    Raises:
        ValueError: If a weight is negative. At the start of training, if a layer does not return a feature map, if the
            number of weights or BatchNorm layers differs from the number of layers, or if an entry of `teacher_norms`
            is not a BatchNorm with the matching number of channels.

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019 (arXiv 1904.01866). The authors use the
        weight 0.001 for CIFAR and 0.0001 for ImageNet. In their code, the teacher runs in training mode, so its
        BatchNorm layers use batch statistics and their running statistics drift. Here, as with every criterion, the
        teacher stays in eval mode and is unchanged.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = ("@preacts",),
        teacher_layers: Sequence[str] = ("@preacts",),
        teacher_norms: Sequence[str] = ("@norms",),
        layer_weights: LayerWeights = "doubling",
    ) -> None:
        super().__init__(student_layers, teacher_layers, layer_weights)
        self.teacher_norms = tuple(teacher_norms)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the connectors, and compute the margins from the teacher's BatchNorm layers."""
        super().build(student, teacher)
        names = resolve_layers(teacher.network, self.teacher_norms)
        if len(names) != len(self.teacher_layers):
            raise ValueError(
                f"OFD reads {len(self.teacher_layers)} teacher layers ({', '.join(self.teacher_layers)}) but got "
                f"{len(names)} teacher_norms ({', '.join(names)}); set one BatchNorm for each layer"
            )
        for number, (name, layer) in enumerate(zip(names, self.teacher_layers, strict=True)):
            margin = _margin_of(teacher.network, name, teacher.outputs.features[layer].shape[1])
            self.register_buffer(f"margin{number}", margin)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the weighted sum of `ofd_loss` over the layers."""
        margins = (getattr(self, f"margin{number}") for number in range(len(self.teacher_layers)))
        pairs = zip(self.connected(student, teacher), margins, strict=True)
        return self.weighted_total([ofd_loss(*pair, margin) for pair, margin in pairs])


def _margin_of(network: nn.Module, name: str, channels: int) -> Tensor:
    """Return the margins `(C,)` of one of the teacher's BatchNorm layers, in float32 as in the authors' code."""
    norm = dict(network.named_modules()).get(name)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(norm, AnyBatchNorm) or weight is None or bias is None:
        found = "does not exist" if norm is None else f"is {type(norm).__name__}"
        raise ValueError(
            f"OFD computes margins from the weight and bias of a BatchNorm, but the teacher's {name!r} {found}; "
            "set teacher_norms to BatchNorm layers"
        )
    if len(weight) != channels:
        raise ValueError(
            f"the teacher's BatchNorm {name!r} has {len(weight)} channels, but the layer that OFD reads has "
            f"{channels}; set teacher_norms to the BatchNorm layers that produce the features"
        )
    return ofd_margin(weight.detach(), bias.detach()).float()
