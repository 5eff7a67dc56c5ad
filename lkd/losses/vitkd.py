"""Feature distillation between vision transformers (ViTKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import generator
from lkd.losses._checks import check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._tokens import tokens_to_map
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_tokens="B N D", teacher_tokens="B N D")
@full_precision
def vitkd_mimicking_loss(student_tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    r"""Squared difference of tokens, summed for each sample.

    $$ \frac{1}{B} \lVert S - T \rVert^2 $$

    Args:
        student_tokens: Student tokens `(B, N, D)`.
        teacher_tokens: Teacher tokens `(B, N, D)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation, 2022 (arXiv 2209.02432).
    """
    return (student_tokens - teacher_tokens).square().sum() / len(student_tokens)


@check_shapes(generated="B N D", teacher_tokens="B N D", masked="B N")
@full_precision
def vitkd_generation_loss(generated: Tensor, teacher_tokens: Tensor, masked: Tensor) -> Tensor:
    r"""Squared difference of the masked tokens, summed for each sample.

    $$ \frac{1}{B} \sum_{i, n \text{ masked}} \lVert S_{in} - T_{in} \rVert^2 $$

    Args:
        generated: Tokens generated from the unmasked student tokens `(B, N, D)`.
        teacher_tokens: Teacher tokens `(B, N, D)`.
        masked: Boolean mask of the masked tokens `(B, N)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation, 2022 (arXiv 2209.02432).

    Example:
        >>> student, teacher = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
        >>> vitkd_generation_loss(student, teacher, torch.tensor([[True, False]])).item()
        3.0
    """
    return ((generated - teacher_tokens).square().sum(2) * masked).sum() / len(generated)


class ViTKD(DistillLoss):
    r"""ViTKD: mimic shallow tokens, generate deep tokens.

    $$ \alpha \sum_{l} \frac{1}{B} \lVert a_l(S_l) - T_l \rVert^2
       + \frac{\beta}{\lambda} \frac{1}{B} \sum_{i, n \text{ masked}} \lVert g(m(a(S)))_{in} - T_{in} \rVert^2 $$

    The linear layers a map the student's tokens to the width of the teacher's where the widths differ. m replaces a
    random share $\lambda$ of the tokens of each sample by a learned token. g consists of two 3x3 convolutions over the
    grid of patches. All of them are trained with the student. Class tokens are dropped. The terms are logged as
    `train/vitkd_mimicking` and `train/vitkd_generation`.

    Args:
        student_layers: Student layers that return tokens: the shallow layers, followed by the one that is generated.
        teacher_layers: Teacher layers, one for each student layer.
        alpha: Weight of the shallow layers.
        beta: Weight of the last layer.
        mask_ratio: Share $\lambda$ of masked tokens, greater than 0 and at most 1.
        student_prefix_tokens: Number of leading student tokens that are not patches (class tokens, registers).
        teacher_prefix_tokens: Number of leading teacher tokens that are not patches.

    Raises:
        ValueError: If a weight is negative or the ratio is out of range. At the start of training, if a layer does not
            return tokens of a square grid, or if the grids of student and teacher differ.

    References:
        Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation, 2022 (arXiv 2209.02432).
    """

    reads_logits = False
    per_process = "random masks"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stage1", "@stage2", "@last_stage"),
        teacher_layers: Sequence[str] = ("@stage1", "@stage2", "@last_stage"),
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        student_prefix_tokens: int = 1,
        teacher_prefix_tokens: int = 1,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_weights(alpha=alpha, beta=beta)
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be greater than 0 and at most 1, got {mask_ratio}; typically 0.5")
        self.alpha = alpha
        self.beta = beta
        self.mask_ratio = mask_ratio
        self.student_prefix_tokens = student_prefix_tokens
        self.teacher_prefix_tokens = teacher_prefix_tokens

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the alignment layers, the mask token and the generator."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=3)
        if len(pairs) < 2:
            raise ValueError("ViTKD requires at least two layers: shallow ones, followed by the one that is generated")
        for student_feature, teacher_feature in pairs:
            maps = (
                tokens_to_map("ViTKD", "student", student_feature, self.student_prefix_tokens),
                tokens_to_map("ViTKD", "teacher", teacher_feature, self.teacher_prefix_tokens),
            )
            if maps[0].shape[2:] != maps[1].shape[2:]:
                raise ValueError(
                    f"ViTKD requires equal numbers of patches, got {maps[0][0, 0].numel()} from the student and "
                    f"{maps[1][0, 0].numel()} from the teacher; use networks with equal image and patch sizes"
                )
        *shallow, last = (
            _aligned(student_feature.shape[2], teacher_feature.shape[2]) for student_feature, teacher_feature in pairs
        )
        width = pairs[-1][1].shape[2]
        self.shallow = nn.ModuleList(shallow)
        self.last = last
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.generation = generator(width)

    def noise(self, tokens: Tensor) -> Tensor:
        """Draw the random numbers that decide which tokens are masked: those with the largest values.

        Args:
            tokens: Tokens `(B, N, C)`.

        Returns:
            Uniform random numbers in [0, 1) `(B, N)`.
        """
        return torch.rand(tokens.shape[:2], device=tokens.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted `vitkd_mimicking_loss` and `vitkd_generation_loss`."""
        *shallow, (student_feature, teacher_feature) = (
            (student_feature[:, self.student_prefix_tokens :], teacher_feature[:, self.teacher_prefix_tokens :])
            for student_feature, teacher_feature in self.pairs(student, teacher)
        )
        pairs = zip(self.shallow, shallow, strict=True)
        mimicking = [
            vitkd_mimicking_loss(align(student_feature), teacher_feature)
            for align, (student_feature, teacher_feature) in pairs
        ]
        aligned = self.last(student_feature)
        num_kept = int(aligned.shape[1] * (1 - self.mask_ratio))
        masked = self.noise(aligned).argsort(1).argsort(1) >= num_kept
        partial = torch.where(masked.unsqueeze(2), self.mask_token.to(aligned.dtype), aligned)
        generated = self.generation(tokens_to_map("ViTKD", "student", partial, 0)).flatten(2).mT
        return {
            "mimicking": self.alpha * total(mimicking),
            "generation": self.beta / self.mask_ratio * vitkd_generation_loss(generated, teacher_feature, masked),
        }


def _aligned(width: int, teacher_width: int) -> nn.Module:
    return nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)
