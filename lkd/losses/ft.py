"""Factor transfer (FT)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lkd.losses._adapters import same_size
from lkd.losses._checks import check_positive, check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.losses.kta import kta_loss
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_factor="B C H W", teacher_factor="B C H' W'")
def ft_loss(student_factor: Tensor, teacher_factor: Tensor, p: float = 1.0) -> Tensor:
    r"""Mean absolute difference of two factors, each scaled to length 1.

    $$ \frac{1}{B C H W} \sum_i \left\lVert \frac{F_{s,i}}{\lVert F_{s,i} \rVert_2} -
       \frac{F_{t,i}}{\lVert F_{t,i} \rVert_2} \right\rVert_1 $$

    For another p than 1 it is $\frac{1}{B} \sum_i \lVert \cdot \rVert_p$. The larger factor is averaged to the smaller
    one's size first.

    Args:
        student_factor: `(B, C, H, W)`.
        teacher_factor: `(B, C, H', W')`.
        p: Which norm, at least 1.

    Returns:
        A scalar; float32 for factors in half precision, else the factors' type.

    References:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018
        (arXiv 1802.04977); the mean over the elements for p = 1 is common code, which the usual weights belong to. The
        CIFAR-100 benchmark (Tian et al., arXiv 1910.10699) compares attention maps of the factors, another loss.

    Example:
        >>> import torch
        >>> factor = torch.rand(2, 8, 4, 4)
        >>> ft_loss(factor, 3 * factor).item() < 1e-7
        True
    """
    return kta_loss(*same_size(student_factor, teacher_factor), p=p, q=2.0)


@full_precision
def _relative_error(decoded: Tensor, feature: Tensor) -> Tensor:
    """Squared distance by squared length, the mean over the samples: 1 for a decoder that says nothing."""
    squares = feature.flatten(1).square().mean(1).clamp(min=1e-6)
    return ((decoded - feature).flatten(1).square().mean(1) / squares).mean()


def _convolutions(*channels: int, norm: bool) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, each followed by a leaky ReLU."""
    layers: list[nn.Module] = []
    for before, behind in pairwise(channels):
        layers += [nn.Conv2d(before, behind, kernel_size=3, padding=1)]
        layers += [nn.BatchNorm2d(behind)] if norm else []
        layers += [nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class FT(DistillLoss):
    """Factor transfer: the student's translated features are to equal the teacher's paraphrased ones.

    An auto-encoder, the paraphraser, learns to say the teacher's features in fewer channels (term `reconstruction`);
    a translator of the student's features learns to say the same (term `factor`), together with the student. The
    paraphraser learns from the first term alone, and is meant to be finished before the second counts: a term whose
    weight is 0 is left out, and what only it trains then stands still. `configs/methods/ft.yaml` switches the weights.

    Args:
        student_layers: Layers of the student whose feature maps it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        paraphrase_rate: A factor's channels per channel of the teacher's feature, greater than 0.
        p: Which norm of the factors' difference, at least 1.
        reconstruction_weight: Weight of the paraphraser's squared error, by the feature's squared length, at least 0.
        factor_weight: Weight of the difference of the factors, at least 0.

    Raises:
        ValueError: If `paraphrase_rate` is not greater than 0, `p` is less than 1, a weight is negative or both are 0,
            or, in training, a layer returns no feature map.

    References:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018
        (arXiv 1802.04977). As in the CIFAR-100 benchmark, the translator has BatchNorm and the paraphraser none; its
        transposed convolutions are convolutions, which with stride 1 is the same. There, the error is not divided by
        the feature's squared length: it then depends on the teacher which learning rate the paraphraser bears, and a
        factor's length does not count anyway.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@last_stage",),
        teacher_layers: Sequence[str] = ("@last_stage",),
        paraphrase_rate: float = 0.5,
        p: float = 1.0,
        reconstruction_weight: float = 1.0,
        factor_weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("0.5 is usual", paraphrase_rate=paraphrase_rate)
        if not p >= 1:
            raise ValueError(f"p must be at least 1, got {p}; 1 is usual")
        check_weights(reconstruction_weight=reconstruction_weight, factor_weight=factor_weight)
        if reconstruction_weight == factor_weight == 0:
            raise ValueError("reconstruction_weight and factor_weight are both 0, so FT compares nothing; set one")
        self.paraphrase_rate = paraphrase_rate
        self.p = p
        self.reconstruction_weight = reconstruction_weight
        self.factor_weight = factor_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the paraphrasers (encoder and decoder) and the translators."""
        self.encoders, self.decoders, self.translators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for ours, theirs in self.pairs(student.outputs, teacher.outputs, dims=4):
            own, other = ours.shape[1], theirs.shape[1]
            factor = max(int(self.paraphrase_rate * other), 1)
            self.encoders.append(_convolutions(other, other, factor, factor, norm=False))
            self.decoders.append(_convolutions(factor, factor, other, other, norm=False))
            self.translators.append(_convolutions(own, own, factor, factor, norm=True))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The terms whose weights are not 0."""
        pairs = self.pairs(student, teacher)
        factors = [encoder(theirs) for encoder, (_, theirs) in zip(self.encoders, pairs, strict=True)]
        terms = {}
        if self.reconstruction_weight:
            decoded = zip(self.decoders, factors, pairs, strict=True)
            errors = [_relative_error(decoder(factor), theirs) for decoder, factor, (_, theirs) in decoded]
            terms["reconstruction"] = self.reconstruction_weight * total(errors)
        if self.factor_weight:
            said = [translator(ours) for translator, (ours, _) in zip(self.translators, pairs, strict=True)]
            losses = [ft_loss(own, factor.detach(), self.p) for own, factor in zip(said, factors, strict=True)]
            terms["factor"] = self.factor_weight * total(losses)
        return terms
