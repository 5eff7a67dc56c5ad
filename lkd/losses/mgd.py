"""Masked generative distillation (MGD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import generator, same_size
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(generated="B D H W", teacher_feature="B D H W")
@full_precision
def mgd_loss(generated: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Squared distance of two features, summed over all but the batch.

    $$ \frac{1}{B} \sum_i \lVert G_i - F_{t, i} \rVert^2 $$

    Args:
        generated: What was made of the student's masked feature, `(B, D, H, W)`.
        teacher_feature: `(B, D, H, W)`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Yang et al.: Masked Generative Distillation, ECCV 2022 (arXiv 2205.01529).

    Example:
        >>> mgd_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).item()
        48.0
    """
    return (generated - teacher_feature).square().flatten(1).sum(1).mean()


class MGD(DistillLoss):
    """Masked generative distillation: of a part of the student's channels, the teacher's feature map is to be made.

    A 1x1 convolution brings the student's feature map to the teacher's channels, where they differ. A random part of
    each image's channels is then set to 0, anew in every step, and two 3x3 convolutions with a ReLU between them make
    the teacher's feature map of the rest. The larger map is averaged to the smaller one's size first.

    The loss sums over channels and pixels, so its weight is small.

    Args:
        student_layers: Layers of the student whose feature maps it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        mask_ratio: Probability with which a channel is set to 0, in [0, 1).

    Raises:
        ValueError: If `mask_ratio` is not in [0, 1), or, in training, a layer returns no feature map.

    References:
        Yang et al.: Masked Generative Distillation, ECCV 2022 (arXiv 2205.01529), which masks pixels. The channels are
        the authors' code for classification, which weighs the loss with 7e-5 on ImageNet, 1.2e-3 on CIFAR-100.
    """

    reads_logits = False
    per_process = "draws what it masks"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@last_stage",),
        teacher_layers: Sequence[str] = ("@last_stage",),
        mask_ratio: float = 0.15,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and less than 1, got {mask_ratio}; 0.15 is usual")
        self.mask_ratio = mask_ratio

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the aligning and the generating convolutions."""
        aligners, generators = [], []
        for ours, theirs in self.pairs(student.outputs, teacher.outputs, dims=4):
            own, other = ours.shape[1], theirs.shape[1]
            aligners.append(nn.Identity() if own == other else nn.Conv2d(own, other, 1))
            generators.append(generator(other))
        self.aligners = nn.ModuleList(aligners)
        self.generators = nn.ModuleList(generators)

    def uniform(self, feature: Tensor) -> Tensor:
        """Random numbers in [0, 1), `(B, D, 1, 1)`, one for each channel of each image: those below the ratio mask.

        Args:
            feature: `(B, D, H, W)`.
        """
        # In float32 also under autocast, so that the precision does not change what is masked.
        return torch.rand(*feature.shape[:2], 1, 1, device=feature.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `mgd_loss` over the layers."""
        losses = []
        for aligner, generate, pair in zip(self.aligners, self.generators, self.pairs(student, teacher), strict=True):
            ours, theirs = same_size(*pair)
            aligned = aligner(ours)
            kept = self.uniform(aligned) >= self.mask_ratio
            losses.append(mgd_loss(generate(aligned * kept), theirs))
        return total(losses)
