"""Masked generative distillation (MGD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lkd.losses._adapters import aligner, channel_pairs, generator, same_size
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(generated="B D H W", teacher_feature="B D H W")
@full_precision
def mgd_loss(generated: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Squared distance of two features, summed over all dimensions except the batch.

    $$ \frac{1}{B} \sum_i \lVert G_i - F_{t, i} \rVert^2 $$

    Args:
        generated: Feature generated from the masked student feature `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Yang et al.: Masked Generative Distillation, ECCV 2022 (arXiv 2205.01529).

    Example:
        >>> mgd_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).item()
        48.0
    """
    return (generated - teacher_feature).square().flatten(1).sum(1).mean()


class MGD(DistillLoss):
    """Masked generative distillation of feature maps.

    A 1x1 convolution maps the student's feature map to the teacher's channels where the numbers of channels differ. In
    each step, a random part of the channels or of the pixels of each image is set to 0, and two 3x3 convolutions with a
    ReLU in between generate the teacher's feature map from the rest. The larger map is average-pooled to the size of
    the smaller one first. The loss is a sum over channels and pixels, so typical weights are small.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        mask_ratio: Probability that a channel or pixel is masked, in [0, 1).
        mask: `channels` for classification, `pixels` for detection and segmentation.

    Raises:
        ValueError: If `mask_ratio` is not in [0, 1), or `mask` is neither of the two. At the start of training, if a
            layer does not return a feature map.

    References:
        Yang et al.: Masked Generative Distillation, ECCV 2022 (arXiv 2205.01529). The paper masks pixels. Masking
        channels follows the authors' code for classification, which uses the weight 7e-5 on ImageNet and 1.2e-3 on
        CIFAR-100. Masking pixels follows their code for segmentation (last stage, ratio 0.75, weight 2e-5, with CWD on
        the logits) and detection (FPN levels, ratio 0.65 and weight 2e-5 for one-stage detectors, 0.45 and 5e-7 for
        two-stage ones).
    """

    reads_logits = False
    per_process = "random masks"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@last_stage",),
        teacher_layers: Sequence[str] = ("@last_stage",),
        mask_ratio: float = 0.15,
        mask: Literal["channels", "pixels"] = "channels",
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if mask not in ("channels", "pixels"):
            raise ValueError(f"mask must be 'channels' or 'pixels', got {mask!r}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and less than 1, got {mask_ratio}; typically 0.15")
        self.mask_ratio = mask_ratio
        self.mask = mask

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the aligning and generating convolutions."""
        aligners, generators = [], []
        for channels, teacher_channels in channel_pairs(self.pairs(student.outputs, teacher.outputs, dims=4)):
            aligners.append(aligner(channels, teacher_channels))
            generators.append(generator(teacher_channels))
        self.aligners = nn.ModuleList(aligners)
        self.generators = nn.ModuleList(generators)

    def uniform(self, feature: Tensor) -> Tensor:
        """Draw the random numbers that decide what is masked: channels below `mask_ratio`, pixels above 1 minus it.

        Args:
            feature: Feature map `(B, D, H, W)`.

        Returns:
            Uniform random numbers in [0, 1) `(B, D, 1, 1)`, or `(B, 1, H, W)` for pixels.
        """
        samples, channels, height, width = feature.shape
        shape = (samples, channels, 1, 1) if self.mask == "channels" else (samples, 1, height, width)
        # float32 also under autocast, so the mask does not depend on the precision
        return torch.rand(shape, device=feature.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `mgd_loss` over the layers."""
        losses = []
        for align, generate, pair in zip(self.aligners, self.generators, self.pairs(student, teacher), strict=True):
            student_feature, teacher_feature = same_size(*pair)
            aligned = align(student_feature)
            losses.append(mgd_loss(generate(aligned * self._kept(aligned)), teacher_feature))
        return total(losses)

    def _kept(self, feature: Tensor) -> Tensor:
        """Return which channels or pixels are not masked, in the notation of the authors' code for each of them."""
        uniform = self.uniform(feature)
        return uniform >= self.mask_ratio if self.mask == "channels" else uniform <= 1 - self.mask_ratio
