"""Masked distillation with receptive tokens (MasKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import aligners
from lkd.losses._checks import check_positive, check_weights
from lkd.losses._dense import enlarged, maps
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(teacher_map="B C H W", tokens="N C")
@full_precision
def maskd_masks(teacher_map: Tensor, tokens: Tensor) -> Tensor:
    r"""Masks of receptive tokens: $m_{rp} = \mathrm{sigmoid}(k_r \cdot t_p)$.

    Args:
        teacher_map: Teacher logits or features `(B, C, H, W)`.
        tokens: Receptive tokens `(N, C)`.

    Returns:
        Masks `(B, N, H, W)` with values between 0 and 1 (float32 for half-precision inputs).

    References:
        Huang et al.: Masked Distillation with Receptive Tokens, ICLR 2023 (arXiv 2205.14589).

    Example:
        >>> maskd_masks(torch.zeros(1, 3, 1, 2), torch.ones(2, 3)).tolist()
        [[[[0.5, 0.5]], [[0.5, 0.5]]]]
    """
    masks = torch.sigmoid(tokens @ teacher_map.flatten(2))
    return masks.view(len(masks), len(tokens), *teacher_map.shape[2:])


@check_shapes(student_map="B C H W", teacher_map="B C H W", masks="B N H W")
@full_precision
def maskd_loss(student_map: Tensor, teacher_map: Tensor, masks: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Mean squared error of masked maps, relative to the area of each mask.

    $$ \frac{1}{2 B N C} \sum_{i, r, c} \frac{\sum_p m_{irp}^2 (s_{icp} - t_{icp})^2}{\sum_p m_{irp} + \epsilon} $$

    Args:
        student_map: Student logits or features `(B, C, H, W)`.
        teacher_map: Teacher logits or features `(B, C, H, W)`.
        masks: Masks `(B, N, H, W)`.
        eps: Constant added to the areas.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Huang et al.: Masked Distillation with Receptive Tokens, ICLR 2023 (arXiv 2205.14589). The loss follows the
        authors' code for segmentation; their code for detection has neither the factor 1/2 nor `eps`.

    Example:
        >>> round(maskd_loss(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.full((1, 2, 4, 4), 0.5)).item(), 4)
        0.25
    """
    squares = masks.square().flatten(2) @ (student_map - teacher_map).square().flatten(2).mT  # (B, N, C)
    return 0.5 * (squares / (masks.flatten(2).sum(2, keepdim=True) + eps)).mean()


@check_shapes(masks="B N H W")
@full_precision
def maskd_diversity_loss(masks: Tensor, eps: float = 1e-12) -> Tensor:
    r"""Mean Dice coefficient of all pairs of masks, by which the tokens learn to select different regions.

    $$ \frac{1}{B N (N - 1)} \sum_{i, r \ne q} \frac{2 \, m_{ir} \cdot m_{iq}}
       {\lVert m_{ir} \rVert^2 + \lVert m_{iq} \rVert^2 + 2 \epsilon} $$

    Args:
        masks: Masks `(B, N, H, W)`, with N at least 2.
        eps: Constant added to each squared norm.

    Returns:
        Scalar between 0 (disjoint masks) and 1 (equal masks); float32 for half-precision inputs.

    References:
        Huang et al.: Masked Distillation with Receptive Tokens, ICLR 2023 (arXiv 2205.14589).

    Example:
        >>> masks = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> maskd_diversity_loss(masks).item()
        0.0
    """
    products = masks.flatten(2) @ masks.flatten(2).mT
    squares = products.diagonal(dim1=1, dim2=2) + eps
    dice = 2 * products / (squares.unsqueeze(1) + squares.unsqueeze(2))
    number = masks.shape[1]
    same = torch.eye(number, dtype=torch.bool, device=masks.device)
    return dice.masked_fill(same, 0).sum() / (len(masks) * number * (number - 1))


class MasKD(DistillLoss):
    """Masked distillation with receptive tokens: compare the regions that learned tokens select.

    Each token is a vector whose inner product with the teacher's map is a mask. The term `train/maskd_map` is the
    squared error of the maps within each mask (`maskd_loss`). Without layers, the logits are compared; with layers,
    their feature maps, where a 1x1 convolution without bias maps the student's channels to the teacher's if their
    numbers differ. The losses of the layers are summed. If maps differ in size, the smaller one is interpolated to the
    size of the larger one.

    With `learn_tokens`, the tokens are trained with the student, only to reduce the overlap of their masks
    (`train/maskd_diversity`, `maskd_diversity_loss`). Otherwise they are frozen: load learned ones with
    `load_state_dict` (`tokens.0`, ...), since the initial ones select all pixels alike.

    Args:
        student_layers: Student layers whose feature maps are compared; empty for the logits.
        teacher_layers: Teacher layers, one for each student layer; empty for the logits.
        num_tokens: Number of tokens of each layer, at least 2.
        learn_tokens: Whether the tokens are trained.
        diversity_weight: Weight of the overlap of the masks.
        eps: Constant added to the areas of the masks, greater than 0.

    Raises:
        ValueError: If `num_tokens` is less than 2, the weight is negative or `eps` is not greater than 0. At the start
            of training, if the logits or a layer's output are not a map.

    References:
        Huang et al.: Masked Distillation with Receptive Tokens, ICLR 2023 (arXiv 2205.14589). The authors learn the
        tokens before the distillation, from the overlap and from the teacher's task loss on its masked map; they use
        8 tokens and the weight 1 for logits on Cityscapes, and 6 tokens for detection.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] = (),
        num_tokens: int = 8,
        learn_tokens: bool = True,
        diversity_weight: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if num_tokens < 2:
            raise ValueError(f"num_tokens must be at least 2, got {num_tokens}; typically 8")
        check_weights(diversity_weight=diversity_weight)
        check_positive("typically 1e-5", eps=eps)
        self.reads_logits = not (self.student_layers or self.teacher_layers)  # type: ignore[misc]  # per instance
        self.num_tokens = num_tokens
        self.learn_tokens = learn_tokens
        self.diversity_weight = diversity_weight
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the tokens, and the 1x1 convolutions of features with different numbers of channels."""
        pairs = maps(self, student.outputs, teacher.outputs)
        self.aligners = aligners(pairs if self.student_layers else [])
        self.tokens = nn.ParameterList(
            nn.Parameter(0.01 * torch.randn(self.num_tokens, teacher_feature.shape[1]), requires_grad=self.learn_tokens)
            for _, teacher_feature in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute `maskd_loss` and, if the tokens are trained, the overlap of their masks, summed over the layers."""
        pairs, losses, overlaps = maps(self, student, teacher), [], []
        if self.student_layers:
            pairs = [
                (align(student_feature), teacher_feature)
                for align, (student_feature, teacher_feature) in zip(self.aligners, pairs, strict=True)
            ]
        for tokens, pair in zip(self.tokens, pairs, strict=True):
            student_feature, teacher_feature = enlarged(*pair)
            masks = maskd_masks(teacher_feature, tokens)
            losses.append(maskd_loss(student_feature, teacher_feature, masks.detach(), self.eps))
            if self.learn_tokens:
                overlaps.append(maskd_diversity_loss(masks))
        terms = {"map": total(losses)}
        return {**terms, "diversity": self.diversity_weight * total(overlaps)} if overlaps else terms
