"""Feature-based distillation for object detectors (FBKD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs
from lkd.losses._attention import spatial_attention
from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._dense import enlarged, maps
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe

_EPS = 1e-5
"""Constant added to the variances in the normalization of the non-local block, as in BatchNorm."""


@check_shapes(adapted="B D H W", teacher_feature="B D H W", student_feature="B C H W")
@full_precision
def fbkd_feature_loss(
    adapted: Tensor, teacher_feature: Tensor, student_feature: Tensor, temperature: float = 0.5
) -> Tensor:
    r"""Euclidean distance of two feature maps, weighted by the spatial attention of both networks.

    $$ \Big( \sum_{i,c,p} \tfrac{1}{2} (A^t_{i,p} + A^s_{i,p}) (F_{t,i,c,p} - f(F_s)_{i,c,p})^2 \Big)^{1/2}, \quad
       A = HW \, \mathrm{softmax}_p (\mathrm{mean}_c |F| / \tau) $$

    The sum includes the samples of the batch. The attention receives no gradient.

    Args:
        adapted: Student feature map with the channels of the teacher f(F_s) `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        student_feature: Student feature map, from which its attention is computed `(B, C, H, W)`.
        temperature: Temperature of the attention, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Zhang, Ma: Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021.

    Example:
        >>> round(fbkd_feature_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 3, 2, 2)).item(), 4)
        4.0
    """
    student_attention, teacher_attention = (
        spatial_attention(feature.detach(), temperature) for feature in (student_feature, teacher_feature)
    )
    attention = (student_attention + teacher_attention) / 2
    distance: Tensor = torch.linalg.vector_norm(attention.sqrt()[:, None] * (teacher_feature - adapted))
    return distance


@check_shapes(student="*", teacher="*")
@full_precision
def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Euclidean distance of two tensors, including the samples of the batch."""
    distance: Tensor = torch.linalg.vector_norm(teacher - student)
    return distance


@full_precision
def _related(theta: Tensor, phi: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the non-local mean of the values at each pixel, divided by a scale, and the scale.

    The mean over all pixels q of (theta_p . phi_q) values_q may overflow for large features; divided by the scale, it
    is of moderate size.
    """
    scales = [part.detach().abs().amax().clamp(min=1) for part in (theta, phi, values)]
    parts = (theta, phi, values)
    query, key, value = (part.flatten(2) / scale for part, scale in zip(parts, scales, strict=True))
    mixed = (value @ key.mT / key.shape[2]) @ query
    return mixed.view_as(theta), math.prod(scales[1:], start=scales[0])


@full_precision
def _normalized(values: Tensor, scale: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Normalize the channels of values * scale over batch and pixels, as BatchNorm does in training."""
    variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0, keepdim=True)
    eps = (_EPS / scale / scale).clamp(min=1e-20)  # smaller ones overflow in the gradient for constant values
    return gain[:, None, None] * (values - mean) * (variance + eps).rsqrt() + bias[:, None, None]


class _NonLocal(nn.Module):
    """Non-local block: add a normalized, transformed sum over all pixels to each pixel.

    The gain of the normalization starts at 0, so that the block starts as the identity.

    Args:
        channels: Number of channels of the map.
        reduction: Divisor of the number of inner channels.
        pool: Size of the max-pooling of the pixels that are summed.
    """

    def __init__(self, channels: int, reduction: int, pool: int) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.theta, self.phi, self.values = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.pool = pool

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map with the relations to all pixels added, in single precision or higher."""
        window = [min(self.pool, size) for size in feature.shape[2:]]
        phi, values = (F.max_pool2d(part(feature), window) for part in (self.phi, self.values))
        mixed, scale = _related(self.theta(feature), phi, values)
        return wide(feature) + _normalized(self.out(mixed.to(self.out.weight.dtype)), scale, self.gain, self.bias)


class _Level(nn.Module):
    """Adapters of one layer."""

    def __init__(self, student_channels: int, teacher_channels: int, reduction: int, pool: int) -> None:
        super().__init__()
        self.feature = nn.Conv2d(student_channels, teacher_channels, 1)
        self.channel = nn.Linear(student_channels, teacher_channels)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.nonlocal_map = nn.Conv2d(student_channels, teacher_channels, 1)
        self.student_block = _NonLocal(student_channels, reduction, pool)
        self.teacher_block = _NonLocal(teacher_channels, reduction, pool)

    def forward(self, student: Tensor, teacher: Tensor, temperature: float) -> dict[str, Tensor]:
        """Return the four distances between two maps of the same size."""
        spatial = self.spatial(student.mean(1, keepdim=True))
        related = self.nonlocal_map(self.student_block(student).to(self.nonlocal_map.weight.dtype))
        return {
            "feature": fbkd_feature_loss(self.feature(student), teacher, student, temperature),
            "channel": _distance(self.channel(student.mean((2, 3))), teacher.mean((2, 3))),
            "spatial": _distance(spatial, teacher.mean(1, keepdim=True)),
            "nonlocal": _distance(related, self.teacher_block(teacher)),
        }


class FBKD(DistillLoss):
    r"""Feature-based distillation for object detectors: attention-guided and non-local distillation.

    Four distances between the feature maps of student and teacher are summed: of the features, weighted by the spatial
    attention of both networks (`fbkd_feature_loss`), of the means over the pixels, of the means over the channels, and
    of the outputs of non-local blocks, which relate each pixel to all others. The student's maps pass through adapters
    first: 1x1 convolutions, a linear layer and a 3x3 convolution. Adapters and non-local blocks are trained with the
    student. The terms are logged as `train/fbkd_feature`, `train/fbkd_channel`, `train/fbkd_spatial` and
    `train/fbkd_nonlocal`.

    $$ w_f \mathcal{L}_f + w_c \lVert \bar t_{hw} - a(\bar s_{hw}) \rVert + w_s \lVert \bar t_c - b(\bar s_c) \rVert
       + w_n \lVert N_t(T) - c(N_s(S)) \rVert $$

    The distances are square roots of sums over the batch, so the loss grows with the square root of the batch size. The
    non-local blocks always normalize with the statistics of the batch, also in validation. Smaller maps are
    interpolated to the size of larger ones. The losses of the layers are summed.

    Args:
        student_layers: Student layers whose feature maps are compared, for example the outputs of an FPN.
        teacher_layers: Teacher layers, one for each student layer.
        feature_weight: Weight of the features.
        channel_weight: Weight of the means over the pixels.
        spatial_weight: Weight of the means over the channels.
        nonlocal_weight: Weight of the relations.
        temperature: Temperature of the spatial attention, greater than 0.
        reduction: Divisor of the number of inner channels of the non-local blocks, or one for each layer.
        pool: Size of the max-pooling of the pixels that non-local blocks sum over, or one for each layer; 1 disables
            it.

    Raises:
        ValueError: If a weight is negative, the temperature is not greater than 0, or `reduction` or `pool` is less
            than 1. At the start of training, if a layer does not return a feature map, or if the number of layers
            differs from that of `reduction` or `pool`.

    References:
        Zhang, Ma: Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient
        Detectors, ICLR 2021. Weights and temperature are those of mmrazor for Faster R-CNN on COCO, which has the
        reductions 4, 4, 2, 2 and the pool sizes 8, 4, 2, 2 for four FPN levels. mmrazor pools by 2 once more, which is
        not in the authors' code; double the pool sizes to reproduce it. The channel attention of the paper is computed
        but not used in all published code, and is left out.
    """

    reads_logits = False
    per_process = "distances that include all samples of a batch"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        feature_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        nonlocal_weight: float = 7e-5,
        temperature: float = 0.5,
        reduction: int | Sequence[int] = 2,
        pool: int | Sequence[int] = 2,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_weights(feature_weight=feature_weight, channel_weight=channel_weight)
        check_weights(spatial_weight=spatial_weight, nonlocal_weight=nonlocal_weight)
        for name, sizes in (("reduction", reduction), ("pool", pool)):
            if min([sizes] if isinstance(sizes, int) else sizes) < 1:
                raise ValueError(f"{name} must be at least 1, got {sizes}")
        self.feature_weight = feature_weight
        self.channel_weight = channel_weight
        self.spatial_weight = spatial_weight
        self.nonlocal_weight = nonlocal_weight
        self.temperature = check_temperature(temperature)
        self.reduction = reduction
        self.pool = pool

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the adapters and the non-local blocks."""
        pairs = maps(self, student.outputs, teacher.outputs)
        sizes = [self._by_layer(name, len(pairs)) for name in ("reduction", "pool")]
        channels = channel_pairs(pairs)
        self.levels = nn.ModuleList(_Level(*level, *pair) for level, *pair in zip(channels, *sizes, strict=True))

    def _by_layer(self, name: str, layers: int) -> list[int]:
        """Return a setting for each layer."""
        sizes = vars(self)[name]
        sizes = [sizes] * layers if isinstance(sizes, int) else list(sizes)
        if len(sizes) != layers:
            raise ValueError(f"FBKD compares {layers} layers but has {len(sizes)} values of {name}; set one for each")
        return sizes

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the four terms, summed over the layers."""
        pairs = zip(self.levels, maps(self, student, teacher), strict=True)
        levels = [level(*enlarged(*pair), self.temperature) for level, pair in pairs]
        terms = {name: total([level[name] for level in levels]) for name in levels[0]}
        weights = {name: vars(self)[f"{name}_weight"] for name in terms}
        return {name: weights[name] * term for name, term in terms.items()}
