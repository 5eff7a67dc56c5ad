"""Criteria for vision transformers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from lkd.losses.adapters import generator
from lkd.losses.base import DistillLoss, read_layers, total
from lkd.losses.checks import check_temperature, check_weights
from lkd.losses.labels import cross_entropies, labelled_cross_entropy
from lkd.losses.logit import kd_loss
from lkd.losses.precision import full_precision
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


def tokens_to_map(owner: str, role: str, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """The tokens of a square grid of patches as a feature map.

    Args:
        owner: The criterion's name.
        role: Whose tokens they are, `student` or `teacher`.
        tokens: `(B, N, C)`, row by row.
        num_prefix_tokens: How many of them, at the beginning, are of no patch (class tokens, registers).

    Returns:
        `(B, C, side, side)`.

    Raises:
        ValueError: If the patches are no square.
    """
    patches = tokens[:, num_prefix_tokens:]
    num_patches = patches.shape[1]
    side = isqrt(num_patches)
    if num_prefix_tokens < 0 or side == 0 or side * side != num_patches:
        raise ValueError(
            f"{owner} reads tokens of a square grid of patches; a layer of the {role} returns {tokens.shape[1]}, which "
            f"are {num_patches} without {num_prefix_tokens} class tokens: set the number of class tokens "
            f"({role}_prefix_tokens), or name another layer"
        )
    return patches.mT.reshape(len(tokens), -1, side, side)


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


@check_shapes(token_logits="B K", teacher_logits="B K")
def _token_loss(token_logits: Tensor, teacher_logits: Tensor, kind: str, temperature: float) -> Tensor:
    if kind == "soft":
        return kd_loss(token_logits, teacher_logits, temperature)
    values = cross_entropies(token_logits, teacher_logits.argmax(1))
    broken = ~teacher_logits.amax(1).isfinite()  # argmax would give them a class
    return values.masked_fill(broken, torch.nan).mean()


@check_shapes(class_logits="B K", token_logits="B K", teacher_logits="B K", target="B")
def deit_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    token_weight: float = 0.5,
    kind: Literal["hard", "soft"] = "hard",
    temperature: float = 3.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The class head learns the labels, the distillation head the teacher's answers.

    $$ (1 - w) \, \mathrm{CE}(z_c, y) + w \, \mathrm{CE}(z_d, \arg\max z_t), \quad \text{or} \quad
       (1 - w) \, \mathrm{CE}(z_c, y)
       + w \, \tau^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / \tau) \,\|\, \mathrm{softmax}(z_d / \tau)) $$

    Args:
        class_logits: What the class head says, `(B, K)`.
        token_logits: What the distillation head says, `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) count in the second part alone.
        token_weight: w, between 0 and 1: weight of the distillation head.
        kind: Whether it learns the teacher's class ("hard") or its softened probabilities ("soft").
        temperature: Greater than 0; of the soft kind.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Touvron et al.: Training Data-Efficient Image Transformers & Distillation through Attention, ICML 2021
        (arXiv 2012.12877), equations 2 and 3. The authors' code divides the soft part by the number of classes, too.

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
        >>> round(deit_loss(logits, logits, logits, target, token_weight=0.5).item(), 4)
        1.1269
    """
    own = labelled_cross_entropy(class_logits, target, label_smoothing)
    return (1 - token_weight) * own + token_weight * _token_loss(token_logits, teacher_logits, kind, temperature)


class DeiT(DistillLoss):
    """Distillation through a token: a transformer with a second head, which learns from the teacher.

    The student is a network with two heads whose logits are their mean, such as timm's
    `deit_tiny_distilled_patch16_224`. The labels are for the class head alone, so the criterion has their
    cross-entropy, and the module's `hard_weight` must be 0, or the labels would reach the distillation head, too. Its
    curves are `train/deit_class` and `train/deit_token`.

    Args:
        class_head: Layer of the student that returns the class head's logits.
        distillation_head: Layer of the student that returns the distillation head's logits.
        token_weight: Weight of the distillation head's term, between 0 and 1; the class head's has the rest.
        kind: Whether the distillation head learns the teacher's class ("hard") or its softened probabilities ("soft").
        temperature: Greater than 0; of the soft kind.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1): for the class head; the
            module's own is of no use where `hard_weight` is 0.

    Raises:
        ValueError: If the weight, the temperature or `label_smoothing` is out of range, or, in training, a head returns
            no logits.

    References:
        Touvron et al.: Training Data-Efficient Image Transformers & Distillation through Attention, ICML 2021
        (arXiv 2012.12877): hard with weight 0.5; soft with weight 0.1 and temperature 3.
    """

    needs_build = False  # it only checks the layers
    skips_unlabelled = None

    def __init__(
        self,
        class_head: str = "head",
        distillation_head: str = "head_dist",
        token_weight: float = 0.5,
        kind: Literal["hard", "soft"] = "hard",
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__([class_head, distillation_head])
        if not 0 <= token_weight <= 1:
            raise ValueError(f"token_weight must be between 0 and 1, got {token_weight}; the class head has the rest")
        if kind not in ("hard", "soft"):
            raise ValueError(f"kind must be 'hard' or 'soft', got {kind!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
        self.token_weight = token_weight
        self.kind = kind
        self.temperature = check_temperature(temperature)
        self.label_smoothing = label_smoothing

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the heads."""
        wanted = student.outputs.logits.shape
        for layer, head in zip(self.student_layers, read_layers(student.outputs, self.student_layers), strict=True):
            shape = head.shape
            if shape != wanted:
                raise ValueError(
                    f"DeiT reads two heads that return logits {tuple(wanted)}; the student's layer {layer!r} returns "
                    f"{tuple(shape)}: name the heads (class_head, distillation_head)"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The two parts of `deit_loss`."""
        own, token = (student.features[layer] for layer in self.student_layers)
        return {
            "class": (1 - self.token_weight) * labelled_cross_entropy(own, batch.target, self.label_smoothing),
            "token": self.token_weight * _token_loss(token, teacher.logits, self.kind, self.temperature),
        }
