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
    r"""Squared difference of the tokens, summed, for each sample.

    $$ \frac{1}{B} \lVert S - T \rVert^2 $$

    Args:
        student_tokens: `(B, N, D)`.
        teacher_tokens: `(B, N, D)`.

    Returns:
        A scalar; float32 for tokens in half precision, else the tokens' type.

    References:
        Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation, 2022 (arXiv 2209.02432).
    """
    return (student_tokens - teacher_tokens).square().sum() / len(student_tokens)


@check_shapes(generated="B N D", teacher_tokens="B N D", masked="B N")
@full_precision
def vitkd_generation_loss(generated: Tensor, teacher_tokens: Tensor, masked: Tensor) -> Tensor:
    r"""`vitkd_mimicking_loss` of the masked tokens alone.

    $$ \frac{1}{B} \sum_{i, n \text{ masked}} \lVert S_{in} - T_{in} \rVert^2 $$

    Args:
        generated: `(B, N, D)`: what was made of the student's tokens that were not masked.
        teacher_tokens: `(B, N, D)`.
        masked: `(B, N)`, bool.

    Returns:
        A scalar; float32 for tokens in half precision, else the tokens' type.

    References:
        Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation, 2022 (arXiv 2209.02432).

    Example:
        >>> student, teacher = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
        >>> vitkd_generation_loss(student, teacher, torch.tensor([[True, False]])).item()
        3.0
    """
    return ((generated - teacher_tokens).square().sum(2) * masked).sum() / len(generated)


class ViTKD(DistillLoss):
    r"""Tokens of two shallow layers are mimicked; those of the last one are generated from a part of them.

    $$ \alpha \sum_{l} \frac{1}{B} \lVert a_l(S_l) - T_l \rVert^2
       + \frac{\beta}{\lambda} \frac{1}{B} \sum_{i, n \text{ masked}} \lVert g(m(a(S)))_{in} - T_{in} \rVert^2 $$

    a are linear layers, where student and teacher are not equally wide; m puts a learned token in the place of the
    share $\lambda$ of the tokens, drawn anew for each sample; g are two 3x3 convolutions over the grid of patches. All
    train with the student. Class tokens are dropped. Its curves are `train/vitkd_mimicking` and
    `train/vitkd_generation`.

    Args:
        student_layers: Layers of the student that return tokens: the shallow ones, and last the one that is generated.
        teacher_layers: The teacher's, as many.
        alpha: Weight of the shallow layers.
        beta: Weight of the last layer.
        mask_ratio: $\lambda$, greater than 0 and at most 1: the share of the tokens that is masked.
        student_prefix_tokens: How many of the student's tokens, at the beginning, are of no patch (class tokens,
            registers).
        teacher_prefix_tokens: How many of the teacher's.

    Raises:
        ValueError: If a weight is negative or the ratio out of range, or, in training, a layer returns no tokens of a
            square grid, or student and teacher have not the same grid.

    References:
        Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation, 2022 (arXiv 2209.02432).
    """

    reads_logits = False
    per_process = "draws what it masks"

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
            raise ValueError(f"mask_ratio must be greater than 0 and at most 1, got {mask_ratio}; 0.5 is usual")
        self.alpha = alpha
        self.beta = beta
        self.mask_ratio = mask_ratio
        self.student_prefix_tokens = student_prefix_tokens
        self.teacher_prefix_tokens = teacher_prefix_tokens

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make what aligns, masks and generates."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=3)
        if len(pairs) < 2:
            raise ValueError("ViTKD reads shallow layers, and last the one that is generated; name two layers at least")
        for ours, theirs in pairs:
            maps = (
                tokens_to_map("ViTKD", "student", ours, self.student_prefix_tokens),
                tokens_to_map("ViTKD", "teacher", theirs, self.teacher_prefix_tokens),
            )
            if maps[0].shape[2:] != maps[1].shape[2:]:
                raise ValueError(
                    f"ViTKD compares tokens one by one; the student has {maps[0][0, 0].numel()} patches, the teacher "
                    f"{maps[1][0, 0].numel()}: take networks with equal image and patch sizes"
                )
        *shallow, last = (_aligned(ours.shape[2], theirs.shape[2]) for ours, theirs in pairs)
        width = pairs[-1][1].shape[2]
        self.shallow = nn.ModuleList(shallow)
        self.last = last
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.generation = generator(width)

    def noise(self, tokens: Tensor) -> Tensor:
        """What decides which tokens are masked: those with the largest numbers.

        Args:
            tokens: `(B, N, C)`.

        Returns:
            `(B, N)`, uniform in [0, 1).
        """
        return torch.rand(tokens.shape[:2], device=tokens.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted parts: `vitkd_mimicking_loss` and `vitkd_generation_loss`."""
        *shallow, (ours, theirs) = (
            (own[:, self.student_prefix_tokens :], other[:, self.teacher_prefix_tokens :])
            for own, other in self.pairs(student, teacher)
        )
        pairs = zip(self.shallow, shallow, strict=True)
        mimicking = [vitkd_mimicking_loss(align(own), other) for align, (own, other) in pairs]
        aligned = self.last(ours)
        num_kept = int(aligned.shape[1] * (1 - self.mask_ratio))
        masked = self.noise(aligned).argsort(1).argsort(1) >= num_kept
        partial = torch.where(masked.unsqueeze(2), self.mask_token.to(aligned.dtype), aligned)
        generated = self.generation(tokens_to_map("ViTKD", "student", partial, 0)).flatten(2).mT
        return {
            "mimicking": self.alpha * total(mimicking),
            "generation": self.beta / self.mask_ratio * vitkd_generation_loss(generated, theirs, masked),
        }


def _aligned(width: int, teacher_width: int) -> nn.Module:
    return nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)
