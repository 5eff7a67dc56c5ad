"""Curriculum temperature for knowledge distillation (CTKD)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkd.losses._checks import check_positive, check_temperature, check_weights
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.losses.kd import kd_loss
from lkd.types import Batch, Outputs, Probe


def _adversarial_temperature(theta: Tensor, lowest: float, extent: float, reversal: float) -> Tensor:
    """`lowest + extent * sigmoid(theta)`, whose gradient reaches theta times `-reversal`."""
    fixed = theta.detach()
    return lowest + extent * (fixed - reversal * (theta - fixed)).sigmoid()


class CTKD(DistillLoss):
    r"""Curriculum temperature: `KD` whose temperature is learned, so as to make the student's task harder.

    The temperature is `min_temperature + temperature_range * sigmoid(theta)`; theta, one number, is a parameter like
    the student's, in the same optimizer, but its gradient is reversed: it climbs where the student descends. The
    curriculum, from easy to hard, is the strength of the reversal, which `lkd.callbacks.Schedule` lets grow from 0
    over the first epochs: `{attribute: criterion.reversal, epochs: 10, shape: cosine}`.

    Args:
        min_temperature: Greater than 0; the lowest temperature.
        temperature_range: Greater than 0; how far the temperature can rise above it.
        reversal: Factor of theta's reversed gradient: 0, the temperature stays; 1, it climbs as fast as the student
            descends.

    Raises:
        ValueError: If a temperature is not greater than 0, or `reversal` negative.

    References:
        Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023 (arXiv 2211.16231), with the global
        temperature, which the defaults keep between 1 and 21, as the authors' code does; its lambda is `-reversal`.

    Example:
        >>> round(CTKD().temperature.item(), 4)
        15.6212
    """

    def __init__(self, min_temperature: float = 1.0, temperature_range: float = 20.0, reversal: float = 1.0) -> None:
        super().__init__()
        self.min_temperature = check_temperature(min_temperature, "min_temperature")
        check_positive("20 is the paper's", temperature_range=temperature_range)
        check_weights(reversal=reversal)
        self.temperature_range = temperature_range
        self.reversal = reversal
        self.theta = nn.Parameter(torch.ones(1))  # (1,): FSDP takes no parameters without a dimension

    @property
    def temperature(self) -> Tensor:
        """The temperature now, a scalar; its gradient reaches theta reversed."""
        return _adversarial_temperature(
            self.theta, self.min_temperature, self.temperature_range, self.reversal
        ).squeeze()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """`kd_loss` at the temperature learned so far."""
        return kd_loss(student.logits, teacher.logits, self.temperature)


class InstanceCTKD(DistillLoss):
    r"""`CTKD` with a temperature for each sample, which a small network tells from the student's and teacher's logits.

    $$ \frac{1}{B} \sum_i \tau_i^2 \,
       \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau_i) \,\|\, \mathrm{softmax}(z_{s,i} / \tau_i)), \quad
       \tau_i = \tau_{\min} + \tau_{\mathrm{range}} \, \sigma(\mathrm{MLP}(z_{s,i}, z_{t,i})) $$

    The network, two linear layers with a ReLU between them, is in the same optimizer as the student, with its gradient
    reversed. It begins with the global temperature's start for all samples.

    Args:
        min_temperature: Greater than 0; the lowest temperature.
        temperature_range: Greater than 0; how far a temperature can rise above it.
        reversal: Factor of the reversed gradient; a curriculum as in `CTKD`.
        hidden_dim: At least 1; the number of hidden units.

    Raises:
        ValueError: If a temperature is not greater than 0, `reversal` negative, or `hidden_dim` less than 1.

    References:
        Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023 (arXiv 2211.16231), the instance-wise
        temperature. The number of hidden units and the start are not theirs but chosen here; the network reads the
        logits without sending a gradient back to the student, which learns from the divergence alone. The loss function
        in the authors' README adds 1e-7 to the probabilities. The student's gradient hardly differs, but the
        temperature network's, which is small, changes by up to 160 %; nothing is added here.
    """

    def __init__(
        self,
        min_temperature: float = 1.0,
        temperature_range: float = 20.0,
        reversal: float = 1.0,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        self.min_temperature = check_temperature(min_temperature, "min_temperature")
        check_positive("20 is the paper's", temperature_range=temperature_range)
        check_weights(reversal=reversal)
        self.temperature_range = temperature_range
        self.reversal = reversal
        self.hidden_dim = hidden_dim

    @property
    def name(self) -> str:
        """That of the method."""
        return "ctkd"

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the network."""
        num_logits = student.outputs.logits.shape[1] + teacher.outputs.logits.shape[1]
        last = nn.Linear(self.hidden_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(num_logits, self.hidden_dim), nn.ReLU(), last)

    @check_shapes(student_logits="B K", teacher_logits="B K")
    def temperatures(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """One temperature for each sample, `(B, 1)`; their gradient reaches the network reversed.

        Args:
            student_logits: `(B, K)`.
            teacher_logits: `(B, K)`.
        """
        theta = self.mlp(torch.cat([student_logits, teacher_logits], dim=1).detach())
        return _adversarial_temperature(wide(theta), self.min_temperature, self.temperature_range, self.reversal)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """`kd_loss` at the samples' temperatures."""
        return kd_loss(student.logits, teacher.logits, self.temperatures(student.logits, teacher.logits))
