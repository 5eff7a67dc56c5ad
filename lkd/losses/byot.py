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
    """Outputs of an exit: logits `(B, K)` and the pooled feature `(B, C)` with the width of the deepest stage."""

    logits: Tensor
    feature: Tensor


class Exit(nn.Module):
    """Classifier on a shallow stage: convolutions to the shape of the deepest feature map and a linear layer.

    The convolutions are 3x3 with BatchNorm and ReLU: one with stride 2 for each required halving of the map, or a
    single one with stride 1.

    Args:
        shallow: Feature map of the shallow stage `(B, C, H, W)`.
        deepest: Feature map of the deepest stage.
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
        """Classify the feature map of the stage."""
        pooled = self.bottleneck(feature).mean((2, 3))
        return ExitOutputs(self.fc(pooled), pooled)


class BYOT(DistillLoss):
    r"""Be your own teacher: self-distillation via early exits.

    $$ \sum_e (1 - a) \, \mathrm{CE}(q_e, y) + a \, \mathrm{KL}(q_C^\tau \,\|\, q_e^\tau)
       + \lambda \, \tfrac{1}{B} \sum_i \lVert f_{e,i} - f_{C,i} \rVert^2 $$

    The sum runs over the exits e, and C is the network itself, whose logits and pooled deepest feature map are
    detached. Each exit (convolutions and a linear layer) is trained with the network. The network's own cross-entropy
    is weighted by the module's `hard_weight`. A teacher is not needed. The terms are logged as `train/byot_hard`,
    `train/byot_kd` and `train/byot_hint`. `lkd.EarlyExitModule` evaluates the exits and can predict with any of them.

    Args:
        student_layers: Layers with feature maps `(B, C, H, W)`, ordered from shallow to deep. Each layer except the
            last gets an exit; the last one provides the feature to which the exits are compared.
        temperature: Softmax temperature of the divergence, greater than 0.
        kd_weight: Share a of the divergence in the loss of an exit, between 0 and 1; the rest is its cross-entropy.
        hint_weight: Weight of the feature distance, at least 0.

    Raises:
        ValueError: If a value is out of range. At the start of training, if there is no shallow layer or a layer does
            not return a feature map.

    References:
        Zhang et al.: Be Your Own Teacher, ICCV 2019 (arXiv 1905.08094). As in the paper, the divergence has no factor
        $\tau^2$ and the distance is squared. Weights and temperature follow the authors' code, which implements a later
        version of the method: 0.03 weights the norm over the whole batch, not squared; the feature passes through
        another linear layer, which the shallowest exit lacks; and the exits consist of separable convolutions.
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
            raise ValueError(
                f"kd_weight must be between 0 and 1, got {kd_weight}; the cross-entropy weighs 1 - kd_weight"
            )
        self.temperature = check_temperature(temperature)
        self.kd_weight = kd_weight
        self.hint_weight = hint_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the exits."""
        *shallow, deepest = self._maps(student.outputs)
        if not shallow:
            raise ValueError(f"BYOT requires a layer before the deepest one, got only {', '.join(self.student_layers)}")
        for feature in (*shallow, deepest):
            check_dims("BYOT", 4, student=feature)
        num_classes = student.outputs.logits.shape[1]
        self.exits = nn.ModuleList(Exit(feature, deepest, num_classes) for feature in shallow)

    def _maps(self, student: Outputs) -> list[Tensor]:
        return read_layers(student, self.student_layers)

    def exit_outputs(self, student: Outputs) -> list[ExitOutputs]:
        """Return the outputs of the exits, from shallow to deep.

        Args:
            student: Outputs of the network, including the features of `student_layers`.
        """
        return [exit_branch(feature) for exit_branch, feature in zip(self.exits, self._maps(student)[:-1], strict=True)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the three terms, summed over the exits."""
        exits, logits = self.exit_outputs(student), student.logits.detach()
        deepest = self._maps(student)[-1].detach().mean((2, 3))
        hard = [labelled_cross_entropy(outputs.logits, batch.target) for outputs in exits]
        soft = [softened_kl(outputs.logits, logits, self.temperature).mean() for outputs in exits]
        hint = [_squared_distance(outputs.feature, deepest) for outputs in exits]
        return {
            "hard": (1 - self.kd_weight) * total(hard),
            "kd": self.kd_weight * total(soft),
            "hint": self.hint_weight * total(hint),
        }


def _squared_distance(feature: Tensor, other: Tensor) -> Tensor:
    """Return the squared distance of pooled features `(B, C)`, averaged over the batch."""
    return mse(feature, other) * feature.shape[1]
