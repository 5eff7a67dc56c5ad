"""Factor transfer (FT)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, same_size
from lkd.losses._checks import check_positive, check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.losses.kta import kta_loss
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_factor="B C H W", teacher_factor="B C H' W'")
def ft_loss(student_factor: Tensor, teacher_factor: Tensor, p: float = 1.0) -> Tensor:
    r"""Mean absolute difference between normalized factors.

    $$ \frac{1}{B C H W} \sum_i \left\lVert \frac{F_{s,i}}{\lVert F_{s,i} \rVert_2} -
       \frac{F_{t,i}}{\lVert F_{t,i} \rVert_2} \right\rVert_1 $$

    For values of p other than 1, the loss is $\frac{1}{B} \sum_i \lVert \cdot \rVert_p$. The larger factor is
    average-pooled to the size of the smaller one first.

    Args:
        student_factor: Student factor `(B, C, H, W)`.
        teacher_factor: Teacher factor `(B, C, H', W')`.
        p: Order of the norm, at least 1.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018 (arXiv
        1802.04977). The mean over the elements for p = 1 follows common implementations, for which the usual weights
        were chosen. The CIFAR-100 benchmark (Tian et al., arXiv 1910.10699) compares attention maps of the factors,
        which is a different loss.

    Example:
        >>> import torch
        >>> factor = torch.rand(2, 8, 4, 4)
        >>> ft_loss(factor, 3 * factor).item() < 1e-7
        True
    """
    return kta_loss(*same_size(student_factor, teacher_factor), p=p, q=2.0)


@full_precision
def _relative_error(decoded: Tensor, feature: Tensor) -> Tensor:
    """Return the squared error relative to the squared norm, averaged over samples: 1 for a decoder that outputs 0."""
    squares = feature.flatten(1).square().mean(1).clamp(min=1e-6)
    return ((decoded - feature).flatten(1).square().mean(1) / squares).mean()


def _convolutions(*channels: int, norm: bool) -> nn.Sequential:
    """Create 3x3 convolutions between consecutive channel numbers, each followed by a leaky ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1)]
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers += [nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class FT(DistillLoss):
    """Factor transfer: match compressed teacher features.

    An autoencoder, the paraphraser, compresses the teacher's features into factors (term `reconstruction`). A
    translator of the student's features, trained with the student, predicts the factors (term `factor`). The
    paraphraser is trained by the first term only and should have converged before the second term is enabled. A term
    with weight 0 is not computed, and the parameters that only this term trains remain unchanged.
    `configs/methods/ft.yaml` schedules the weights.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        paraphrase_rate: Number of factor channels divided by the number of teacher channels, greater than 0.
        p: Order of the norm of the factor difference, at least 1.
        reconstruction_weight: Weight of the paraphraser's relative squared error, at least 0.
        factor_weight: Weight of the factor difference, at least 0.

    Raises:
        ValueError: If `paraphrase_rate` is not greater than 0, `p` is less than 1, a weight is negative, or both
            weights are 0. At the start of training, if a layer does not return a feature map.

    References:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018 (arXiv
        1802.04977). As in the CIFAR-100 benchmark, the translator has BatchNorm and the paraphraser does not.
        Convolutions replace its transposed convolutions, which are equivalent for stride 1. The benchmark does not
        divide the reconstruction error by the squared norm of the feature; the largest stable learning rate of the
        paraphraser then depends on the teacher. The norm of a factor has no effect on the loss.
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
        check_positive("typically 0.5", paraphrase_rate=paraphrase_rate)
        if not p >= 1:
            raise ValueError(f"p must be at least 1, got {p}; typically 1")
        check_weights(reconstruction_weight=reconstruction_weight, factor_weight=factor_weight)
        if reconstruction_weight == factor_weight == 0:
            raise ValueError("reconstruction_weight and factor_weight are both 0; set at least one of them")
        self.paraphrase_rate = paraphrase_rate
        self.p = p
        self.reconstruction_weight = reconstruction_weight
        self.factor_weight = factor_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the paraphrasers (encoders and decoders) and the translators."""
        self.encoders, self.decoders, self.translators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for channels, teacher_channels in channel_pairs(self.pairs(student.outputs, teacher.outputs, dims=4)):
            factor = max(int(self.paraphrase_rate * teacher_channels), 1)
            self.encoders.append(_convolutions(teacher_channels, teacher_channels, factor, factor, norm=False))
            self.decoders.append(_convolutions(factor, factor, teacher_channels, teacher_channels, norm=False))
            self.translators.append(_convolutions(channels, channels, factor, factor, norm=True))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the terms with non-zero weights."""
        pairs = self.pairs(student, teacher)
        factors = [encoder(teacher_feature) for encoder, (_, teacher_feature) in zip(self.encoders, pairs, strict=True)]
        terms = {}
        if self.reconstruction_weight:
            decoded = zip(self.decoders, factors, pairs, strict=True)
            errors = [
                _relative_error(decoder(factor), teacher_feature) for decoder, factor, (_, teacher_feature) in decoded
            ]
            terms["reconstruction"] = self.reconstruction_weight * total(errors)
        if self.factor_weight:
            targets = [factor.detach() for factor in factors]
            predicted = [
                translator(student_feature)
                for translator, (student_feature, _) in zip(self.translators, pairs, strict=True)
            ]
            losses = [ft_loss(*pair, self.p) for pair in zip(predicted, targets, strict=True)]
            terms["factor"] = self.factor_weight * total(losses)
        return terms
