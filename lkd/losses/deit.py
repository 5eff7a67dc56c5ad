"""Distillation through a distillation token (DeiT)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._labels import cross_entropies, labelled_cross_entropy
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, read_layers
from lkd.losses.kd import kd_loss
from lkd.types import Batch, Outputs, Probe


@check_shapes(token_logits="B K", teacher_logits="B K")
def _token_loss(token_logits: Tensor, teacher_logits: Tensor, kind: str, temperature: float) -> Tensor:
    if kind == "soft":
        return kd_loss(token_logits, teacher_logits, temperature)
    values = cross_entropies(token_logits, teacher_logits.argmax(1))
    broken = ~teacher_logits.amax(1).isfinite()  # argmax returns a class even for NaN
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
    r"""Cross-entropy of the class head with the label, and of the distillation head with the teacher.

    $$ (1 - w) \, \mathrm{CE}(z_c, y) + w \, \mathrm{CE}(z_d, \arg\max z_t), \quad \text{or} \quad
       (1 - w) \, \mathrm{CE}(z_c, y)
       + w \, \tau^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / \tau) \,\|\, \mathrm{softmax}(z_d / \tau)) $$

    Args:
        class_logits: Logits of the class head `(B, K)`.
        token_logits: Logits of the distillation head `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` contribute only to the second term.
        token_weight: Weight w of the distillation head, between 0 and 1.
        kind: `hard`: match the teacher's predicted class; `soft`: match the teacher's softened probabilities.
        temperature: Softmax temperature for `soft`, greater than 0.
        label_smoothing: Label smoothing of the class head, in [0, 1).

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Touvron et al.: Training Data-Efficient Image Transformers & Distillation through Attention, ICML 2021 (arXiv
        2012.12877), equations 2 and 3. The authors' code additionally divides the soft term by the number of classes.

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
        >>> round(deit_loss(logits, logits, logits, target, token_weight=0.5).item(), 4)
        1.1269
    """
    class_loss = labelled_cross_entropy(class_logits, target, label_smoothing)
    return (1 - token_weight) * class_loss + token_weight * _token_loss(token_logits, teacher_logits, kind, temperature)


class DeiT(DistillLoss):
    """DeiT: a distillation head learns from the teacher.

    The student has two heads and returns the mean of their logits, such as timm's `deit_tiny_distilled_patch16_224`.
    The class head learns the labels and the distillation head learns from the teacher (see `deit_loss`). The criterion
    includes the cross-entropy of the class head, so the module's `hard_weight` must be 0; otherwise, the distillation
    head would learn the labels as well. The terms are logged as `train/deit_class` and `train/deit_token`.

    Args:
        class_head: Student layer that returns the logits of the class head.
        distillation_head: Student layer that returns the logits of the distillation head.
        token_weight: Weight w of the distillation head, between 0 and 1; the class head has the weight 1 - w.
        kind: `hard`: match the teacher's predicted class; `soft`: match the teacher's softened probabilities.
        temperature: Softmax temperature for `soft`, greater than 0.
        label_smoothing: Label smoothing of the class head, in [0, 1). The module's own label smoothing has no effect
            with `hard_weight` 0.

    Raises:
        ValueError: If the weight, the temperature or `label_smoothing` is out of range. At the start of training, if a
            head does not return logits.

    References:
        Touvron et al.: Training Data-Efficient Image Transformers & Distillation through Attention, ICML 2021
        (arXiv 2012.12877): `hard` with weight 0.5; `soft` with weight 0.1 and temperature 3.
    """

    needs_build = False  # `build` only checks the layers
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
        """Check the shapes of the heads' outputs."""
        wanted = student.outputs.logits.shape
        for layer, head in zip(self.student_layers, read_layers(student.outputs, self.student_layers), strict=True):
            shape = head.shape
            if shape != wanted:
                raise ValueError(
                    f"DeiT requires two heads that return logits {tuple(wanted)}, but the student layer {layer!r} "
                    f"returns {tuple(shape)}; set class_head and distillation_head"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms of `deit_loss`."""
        class_logits, token_logits = (student.features[layer] for layer in self.student_layers)
        return {
            "class": (1 - self.token_weight) * labelled_cross_entropy(class_logits, batch.target, self.label_smoothing),
            "token": self.token_weight * _token_loss(token_logits, teacher.logits, self.kind, self.temperature),
        }
