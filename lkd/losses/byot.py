"""Be your own teacher (BYOT): self-distillation through early exits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from lkd.losses._checks import check_dims, check_temperature, check_weights
from lkd.losses._divergence import softened_kl
from lkd.losses._labels import labelled_cross_entropy
from lkd.losses._precision import mse
from lkd.losses.base import DistillLoss, read_layers, total
from lkd.types import Batch, Outputs, Probe


class ExitOutputs(NamedTuple):
    """What an exit answers: logits `(B, K)`, and the feature `(B, C)` that it brings to the deepest stage's form."""

    logits: Tensor
    feature: Tensor


class Exit(nn.Module):
    """A classifier behind a shallow stage: convolutions that bring its map to the deepest one's form, a linear layer.

    One 3x3 convolution with stride 2 for each time that the map must be halved, or one with stride 1; each with
    BatchNorm and ReLU.

    Args:
        shallow: The stage's map `(B, C, H, W)`.
        deepest: The deepest stage's.
        num_classes: Number of logits.
    """

    def __init__(self, shallow: Tensor, deepest: Tensor, num_classes: int) -> None:
        super().__init__()
        halvings = max((shallow.shape[2] // deepest.shape[2]).bit_length() - 1, 0)
        channels = [shallow.shape[1]] + [deepest.shape[1]] * max(halvings, 1)
        blocks = []
        for before, after in pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, stride=2 if halvings else 1, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.bottleneck = nn.Sequential(*blocks)
        self.fc = nn.Linear(deepest.shape[1], num_classes)

    def forward(self, feature: Tensor) -> ExitOutputs:
        """Classify what the stage returned."""
        pooled = self.bottleneck(feature).mean((2, 3))
        return ExitOutputs(self.fc(pooled), pooled)


class BYOT(DistillLoss):
    r"""Be your own teacher: exits behind the shallow stages learn from the labels and from the deepest stage.

    $$ \sum_e (1 - a) \, \mathrm{CE}(q_e, y) + a \, \mathrm{KL}(q_C^\tau \,\|\, q_e^\tau)
       + \lambda \, \tfrac{1}{B} \sum_i \lVert f_{e,i} - f_{C,i} \rVert^2 $$

    over the exits e; C is the network itself, whose answers and pooled last map are taken without gradient. Each exit
    (convolutions and a linear layer) trains with the network, whose own cross-entropy is the module's `hard_weight`. No
    teacher is asked. Curves: `train/byot_hard`, `train/byot_kd`, `train/byot_hint`.

    `lkd.EarlyExitModule` measures the exits, and lets one of them answer.

    Args:
        student_layers: Layers with feature maps `(B, C, H, W)`, from shallow to deep; there is an exit behind each but
            the last, which is what the exits' features are compared with.
        temperature: Greater than 0; softens the divergence.
        kd_weight: a, between 0 and 1: how much of an exit's loss is the divergence; the rest is its cross-entropy.
        hint_weight: Weight of the features' distance, at least 0.

    Raises:
        ValueError: If a value is out of range, or, in training, there is no shallow layer, or a layer returns no
            feature map.

    References:
        Zhang et al.: Be Your Own Teacher, ICCV 2019 (arXiv 1905.08094). As there, the divergence has no factor
        $\tau^2$, and the distance is squared. The weights and the temperature are the authors' code's, which is of a
        later version of the method: there, 0.03 weighs the distance over the whole batch, not squared, its feature
        passes another linear layer, and the shallowest exit has none; and exits are made of separable convolutions.
    """

    needs_teacher = False
    reads_logits = False
    skips_unlabelled = None

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        temperature: float = 3.0,
        kd_weight: float = 0.3,
        hint_weight: float = 0.03,
    ) -> None:
        super().__init__(student_layers)
        check_weights(hint_weight=hint_weight)
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"kd_weight must be between 0 and 1, got {kd_weight}; the cross-entropy weighs the rest")
        self.temperature = check_temperature(temperature)
        self.kd_weight = kd_weight
        self.hint_weight = hint_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the exits."""
        *shallow, deepest = self._maps(student.outputs)
        if not shallow:
            raise ValueError(f"BYOT needs a layer before the deepest, got {', '.join(self.student_layers)} alone")
        for feature in (*shallow, deepest):
            check_dims("BYOT", 4, student=feature)
        num_classes = student.outputs.logits.shape[1]
        self.exits = nn.ModuleList(Exit(feature, deepest, num_classes) for feature in shallow)

    def _maps(self, student: Outputs) -> list[Tensor]:
        return read_layers(student, self.student_layers)

    def exit_outputs(self, student: Outputs) -> list[ExitOutputs]:
        """What the exits answer, from shallow to deep.

        Args:
            student: What the network answered, with the features of `student_layers`.
        """
        return [leave(feature) for leave, feature in zip(self.exits, self._maps(student)[:-1], strict=True)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The three sums over the exits."""
        answers, logits = self.exit_outputs(student), student.logits.detach()
        deepest = self._maps(student)[-1].detach().mean((2, 3))
        hard = [labelled_cross_entropy(answer.logits, batch.target) for answer in answers]
        soft = [softened_kl(answer.logits, logits, self.temperature).mean() for answer in answers]
        hint = [_squared_distance(answer.feature, deepest) for answer in answers]
        return {
            "hard": (1 - self.kd_weight) * total(hard),
            "kd": self.kd_weight * total(soft),
            "hint": self.hint_weight * total(hint),
        }


def _squared_distance(feature: Tensor, other: Tensor) -> Tensor:
    """Of two pooled features `(B, C)`, the mean over the batch."""
    return mse(feature, other) * feature.shape[1]
