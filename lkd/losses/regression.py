"""Criteria that regress the teacher's feature with a learned projection, some with a learned variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses.adapters import same_size
from lkd.losses.base import DistillLoss, total
from lkd.losses.checks import check_positive, check_temperature
from lkd.losses.logit import softened_kl
from lkd.losses.precision import full_precision
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


@check_shapes(mean="B D H W", teacher_feature="B D H W", variance="D")
@full_precision
def vid_loss(mean: Tensor, teacher_feature: Tensor, variance: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's feature under a Gaussian that the student predicts.

    $$ \frac{1}{B D H W} \sum \frac{1}{2} \Big[ \frac{(\mu - F_t)^2}{\sigma_d^2} + \log \sigma_d^2 \Big] $$

    The constant log(2 pi) / 2 is left out.

    Args:
        mean: What the student predicts, `(B, D, H, W)`.
        teacher_feature: `(B, D, H, W)`.
        variance: One for each channel, `(D,)`, greater than 0.

    Returns:
        A scalar in nats; float32 for features in half precision, else the features' type.

    References:
        Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019 (arXiv 1904.05835);
        the mean over all elements is the CIFAR-100 benchmark's (Tian et al., arXiv 1910.10699).

    Example:
        >>> vid_loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.ones(1)).item()
        0.5
    """
    spread = variance.view(1, -1, 1, 1)
    return ((mean - teacher_feature).square() / spread + spread.log()).mean() / 2


class VID(DistillLoss):
    """Variational information distillation: from the student's feature map, the teacher's is to be predictable.

    Three 1x1 convolutions with ReLU between them predict the teacher's feature map; each of its channels has a
    variance that is learned too: channels that the student cannot predict then count less. Layers are compared one by
    one, and the losses added. The larger map is averaged to the smaller one's size first.

    Args:
        student_layers: Layers of the student whose feature maps it reads.
        teacher_layers: The teacher's, as many.
        initial_variance: The channels' variance at the start, greater than `eps`.
        eps: The least variance, greater than 0.

    Raises:
        ValueError: If not 0 < eps < initial_variance, or, in training, a layer returns no feature map.

    References:
        Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019 (arXiv 1904.05835). The
        convolutions' width and the weight 1 are the CIFAR-100 benchmark's (Tian et al., arXiv 1910.10699).
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not 0 < eps < initial_variance < math.inf:
            raise ValueError(
                f"VID needs 0 < eps < initial_variance, got eps {eps} and initial_variance {initial_variance}; take "
                "finite numbers, 1e-5 and 5 are usual"
            )
        self.initial_variance = initial_variance
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the regressors and the variances."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        beyond = self.initial_variance - self.eps
        raw = beyond + math.log(-math.expm1(-beyond))  # softplus backwards; expm1(710) would overflow
        self.regressors = nn.ModuleList(_mean_regressor(ours.shape[1], theirs.shape[1]) for ours, theirs in pairs)
        self.raw_variances = nn.ParameterList(torch.full((theirs.shape[1],), raw) for _, theirs in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `vid_loss` over the layers."""
        losses = []
        pairs = zip(self.regressors, self.raw_variances, self.pairs(student, teacher), strict=True)
        for regressor, raw, (ours, theirs) in pairs:
            ours, theirs = same_size(ours, theirs)
            losses.append(vid_loss(regressor(ours), theirs, F.softplus(raw) + self.eps))
        return total(losses)


def _mean_regressor(in_channels: int, out_channels: int) -> nn.Sequential:
    first, second, third = (
        nn.Conv2d(channels, out_channels, 1, bias=False) for channels in (in_channels, out_channels, out_channels)
    )
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


@check_shapes(student_feature="B D", teacher_feature="B D", log_variance="B D")
@full_precision
def pad_loss(student_feature: Tensor, teacher_feature: Tensor, log_variance: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Squared difference of two features, less where the predicted variance is large, and the variance's price.

    $$ \frac{1}{B D} \sum \Big[ \frac{(f_t - f_s)^2}{e^{\lambda} + \epsilon} + \lambda \Big], \quad
       \lambda = \log \sigma^2 $$

    Args:
        student_feature: `(B, D)`.
        teacher_feature: `(B, D)`.
        log_variance: `(B, D)`.
        eps: Added to the variance, greater than 0.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020 (arXiv 2008.01458), with the mean over the elements
        of torchdistill's code, which tells that the authors take it.

    Example:
        >>> round(pad_loss(torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 4), eps=0.25).item(), 4)
        0.8
    """
    # 1 / (exp + eps) by logarithms: exp alone would overflow, and make its gradient 0 * inf.
    precision = torch.logaddexp(log_variance, log_variance.new_full((), eps).log()).neg().exp()
    return ((teacher_feature - student_feature).square() * precision + log_variance).mean()


class PAD(DistillLoss):
    """Prime-aware adaptive distillation: images whose teacher's feature is hard to reach count less.

    A linear layer with BatchNorm predicts, from the student's pooled feature, the log of the variance of the difference
    from the teacher's, for each element. Where the sizes differ, another linear layer brings the student's feature to
    the teacher's.

    Args:
        student_layers: Layers of the student whose pooled features it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        eps: Added to the variance, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0, or, in training, a layer returns no pooled feature.

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020 (arXiv 2008.01458), who let it follow a training
        without variances. The paper's networks have features of equal size.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("1e-6 is usual", eps=eps)
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projectors, and what predicts the variances."""
        projectors, heads = [], []
        for ours, theirs in self.pairs(student.outputs, teacher.outputs, dims=2):
            sizes = ours.shape[1], theirs.shape[1]
            projectors.append(nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes))
            heads.append(_normalized_linear(*sizes))
        self.projectors = nn.ModuleList(projectors)
        self.log_variances = nn.ModuleList(heads)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `pad_loss` over the layers."""
        parts = zip(self.projectors, self.log_variances, self.pairs(student, teacher), strict=True)
        losses = [
            pad_loss(projector(ours), theirs, log_variance(ours), self.eps)
            for projector, log_variance, (ours, theirs) in parts
        ]
        return total(losses)


def _normalized_linear(in_features: int, out_features: int, eps: float = 1e-5, affine: bool = True) -> nn.Sequential:
    """A linear layer and a BatchNorm, which makes a bias of the former useless."""
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features, eps=eps, affine=affine)
    )


@check_shapes(student_feature="B D", teacher_feature="B D")
@full_precision
def srd_loss(student_feature: Tensor, teacher_feature: Tensor, exponent: float = 4.0) -> Tensor:
    r"""Logarithm of the summed powers of the differences of two normalised features.

    $$ 2 \log \sum_{i, d} |f_{s, id} - f_{t, id}|^e $$

    The sum runs over the batch too. A sum of 0 counts as the least positive number, and has no gradient.

    Args:
        student_feature: `(B, D)`, projected and normalised.
        teacher_feature: `(B, D)`, normalised.
        exponent: At least 1; a larger one lets the largest differences decide.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024
        (arXiv 2303.11098). The factor 2 is the authors' code.

    Example:
        >>> srd_loss(torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])).item()
        0.0
    """
    distance = (student_feature - teacher_feature).abs().pow(exponent).sum()
    return 2 * distance.clamp_min(torch.finfo(distance.dtype).tiny).log()


class SRD(DistillLoss):
    """The simple recipe for distillation: pooled features, projected and normalised, and logits.

    A linear layer without bias brings the student's feature to the teacher's size, also where it has it; a BatchNorm
    without scale and shift then normalises both. Their difference (`srd_loss`) is added to the divergence of the
    teacher's softened probabilities from the student's, which the square of the temperature does not multiply here.

    Args:
        student_layers: Layers of the student whose pooled features it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        exponent: Power of the differences, at least 1; a larger one lets the largest differences decide.
        temperature: Softens both networks' probabilities, greater than 0.

    Raises:
        ValueError: If the exponent is less than 1 or the temperature not greater than 0, or, in training, a layer
            returns no pooled feature.

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024
        (arXiv 2303.11098). 4 is the exponent of its ImageNet runs; the authors' code has 1 where none is given.
    """

    compares_samples = True
    per_process = "takes the logarithm of the sum over its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        exponent: float = 4.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not 1 <= exponent < math.inf:
            raise ValueError(f"exponent must be at least 1, got {exponent}; take a finite number, 4 is usual")
        self.exponent = exponent
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projectors and the normalisations."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=2)
        self.projectors = nn.ModuleList(
            _normalized_linear(ours.shape[1], theirs.shape[1], eps=1e-4, affine=False) for ours, theirs in pairs
        )
        self.teacher_norms = nn.ModuleList(
            nn.BatchNorm1d(theirs.shape[1], eps=1e-4, affine=False) for _, theirs in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`features`, the sum of `srd_loss` over the layers, and `logits`."""
        parts = zip(self.projectors, self.teacher_norms, self.pairs(student, teacher), strict=True)
        losses = [srd_loss(projector(ours), norm(theirs), self.exponent) for projector, norm, (ours, theirs) in parts]
        divergence = softened_kl(student.logits, teacher.logits, self.temperature).mean()
        return {"features": total(losses), "logits": divergence}
