"""Overhaul of feature distillation (OFD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.layers import resolve_layers
from lkd.losses._adapters import pooled_to
from lkd.losses._connectors import ConnectedLoss, LayerWeights
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


@check_shapes(weight="C", bias="C")
def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""What a neuron behind a BatchNorm says on average where it is not active, for each channel.

    $$ m = \mathrm{E}[x \mid x < 0] = \beta - \sigma \, \varphi(-\beta / \sigma) \, / \, \Phi(-\beta / \sigma), \quad
       x \sim \mathcal{N}(\beta, \sigma^2), \; \sigma = |\gamma| $$

    and $-3 \sigma$ for channels that are hardly ever below 0: $\Phi(-\beta / \sigma) \le 0.001$.

    Args:
        weight: The BatchNorm's weight gamma, `(C,)`.
        bias: Its bias beta, `(C,)`.

    Returns:
        `(C,)`, at most 0.

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019 (arXiv 1904.01866); the exception
        is the authors' code.

    Example:
        >>> ofd_margin(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 9.0, -2.0]))
        tensor([-0.7979, -3.0000, -2.0000])
    """
    weight, bias = wide(weight), wide(bias)
    deviation = weight.abs()
    bound = -bias / deviation.clamp(min=torch.finfo(weight.dtype).tiny)  # a constant channel: 0, or infinite
    share = torch.special.ndtr(bound)
    density = torch.exp(-bound.square() / 2) / math.sqrt(2 * math.pi)
    mean = bias - deviation * density / share.clamp(min=0.001)
    return torch.where(share > 0.001, mean, -3 * deviation)


@check_shapes(student_feature="B C H W", teacher_feature="B C H' W'", margin="C")
@full_precision
def ofd_loss(student_feature: Tensor, teacher_feature: Tensor, margin: Tensor) -> Tensor:
    r"""Partial squared distance to the teacher's feature behind a margin ReLU.

    $$ \frac{1}{B} \sum_{i,c,h,w} \begin{cases} 0 & s \le \max(t, m_c) \text{ and } t \le 0 \\
       (s - \max(t, m_c))^2 & \text{else} \end{cases} $$

    with the features s of the student and t of the teacher before their activation: a negative t only asks for a
    student's value that is no larger. The teacher's map is averaged to the student's size first.

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, C, H', W')`.
        margin: The least value that is asked for, `(C,)`, as `ofd_margin` has it.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

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
    """Overhaul of feature distillation: the teacher's features behind a margin ReLU, and a partial distance.

    The features are those before the activation; the student's go through a 1x1 convolution with BatchNorm. The
    margins follow from the weights of the BatchNorm layers that the teacher's features come from.

    Args:
        student_layers: Layers of the student whose feature maps it reads.
        teacher_layers: The teacher's, as many.
        teacher_norms: The BatchNorm layers that the teacher's features come from, as many.
        layer_weights: What the layers weigh: `equal`: 1; `doubling`: each twice as much as the one before it, the last
            one 1; or a number for each.

    Raises:
        ValueError: If a weight is negative, or, in training, a layer returns no feature map, the weights or the
            BatchNorm layers are not as many as the layers, or one of these is no BatchNorm of as many channels.

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019 (arXiv 1904.01866), who weigh it with
        0.001 for CIFAR and 0.0001 for ImageNet. In their code the teacher runs in training mode, so that its BatchNorm
        uses the batch's statistics and its running ones drift; here, as with every criterion, the teacher stays in eval
        mode and unchanged.
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
        """Make the connectors, and the margins from the teacher's BatchNorm layers."""
        super().build(student, teacher)
        names = resolve_layers(teacher.network, self.teacher_norms)
        if len(names) != len(self.teacher_layers):
            raise ValueError(
                f"OFD reads {len(self.teacher_layers)} layers of the teacher ({', '.join(self.teacher_layers)}) and "
                f"got {len(names)} teacher_norms ({', '.join(names)}); name the BatchNorm that each layer comes from"
            )
        for number, (name, layer) in enumerate(zip(names, self.teacher_layers, strict=True)):
            margin = _margin_of(teacher.network, name, teacher.outputs.features[layer].shape[1])
            self.register_buffer(f"margin{number}", margin)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The weighted sum of `ofd_loss` over the layers."""
        margins = (getattr(self, f"margin{number}") for number in range(len(self.teacher_layers)))
        pairs = zip(self.connected(student, teacher), margins, strict=True)
        return self.weighted_total([ofd_loss(ours, theirs, margin) for (ours, theirs), margin in pairs])


def _margin_of(network: nn.Module, name: str, channels: int) -> Tensor:
    """The margins behind one of the teacher's BatchNorm layers, `(C,)`, in float32 as in the authors' code."""
    norm = dict(network.named_modules()).get(name)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or weight is None or bias is None:
        raise ValueError(
            f"OFD computes margins from the weight and the bias of a BatchNorm, and the teacher's {name!r} is "
            f"{'not there' if norm is None else type(norm).__name__}; name BatchNorm layers (teacher_norms)"
        )
    if len(weight) != channels:
        raise ValueError(
            f"the teacher's BatchNorm {name!r} has {len(weight)} channels, and the layer that OFD reads {channels}; "
            "name the BatchNorm that the layer comes from (teacher_norms)"
        )
    return ofd_margin(weight.detach(), bias.detach()).float()
