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
    """Return `lowest + extent * sigmoid(theta)`; the gradient with respect to theta is multiplied by `-reversal`."""
    fixed = theta.detach()
    return lowest + extent * (fixed - reversal * (theta - fixed)).sigmoid()


class CTKD(DistillLoss):
    """Curriculum temperature: KD with a learned temperature.

    The temperature is `min_temperature + temperature_range * sigmoid(theta)`. The scalar parameter theta shares the
    student's optimizer, but its gradient is reversed: it maximizes the loss that the student minimizes. The curriculum
    from easy to hard results from increasing the strength of the reversal from 0 over the first epochs, for example
    with `lkd.callbacks.Schedule`: `{attribute: criterion.reversal, epochs: 10, shape: cosine}`.

    Args:
        min_temperature: Lower bound of the temperature, greater than 0.
        temperature_range: Difference between upper and lower bound of the temperature, greater than 0.
        reversal: Factor of theta's reversed gradient, at least 0. With 0 the temperature is constant; with 1 theta
            ascends with the full gradient.

    Raises:
        ValueError: If `min_temperature` or `temperature_range` is not greater than 0, or if `reversal` is negative.

    References:
        Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023 (arXiv 2211.16231), global temperature.
        As in the authors' code, the defaults keep the temperature between 1 and 21. The authors' lambda equals
        `-reversal`.

    Example:
        >>> round(CTKD().temperature.item(), 4)
        15.6212
    """

    def __init__(self, min_temperature: float = 1.0, temperature_range: float = 20.0, reversal: float = 1.0) -> None:
        super().__init__()
        self.min_temperature = check_temperature(min_temperature, "min_temperature")
        check_positive("the paper uses 20", temperature_range=temperature_range)
        check_weights(reversal=reversal)
        self.temperature_range = temperature_range
        self.reversal = reversal
        self.theta = nn.Parameter(torch.ones(1))  # FSDP does not support 0-dimensional parameters

    @property
    def temperature(self) -> Tensor:
        """Current temperature as a scalar; its gradient reaches theta reversed."""
        return _adversarial_temperature(
            self.theta, self.min_temperature, self.temperature_range, self.reversal
        ).squeeze()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `kd_loss` at the learned temperature."""
        return kd_loss(student.logits, teacher.logits, self.temperature)


class InstanceCTKD(DistillLoss):
    r"""Curriculum temperature with one temperature per sample.

    $$ \frac{1}{B} \sum_i \tau_i^2 \,
       \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau_i) \,\|\, \mathrm{softmax}(z_{s,i} / \tau_i)), \quad
       \tau_i = \tau_{\min} + \tau_{\mathrm{range}} \, \sigma(\mathrm{MLP}(z_{s,i}, z_{t,i})) $$

    The MLP, two linear layers with a ReLU in between, predicts the temperatures from the logits of student and teacher.
    It shares the student's optimizer, with reversed gradients, and is initialized to the initial temperature of `CTKD`.

    Args:
        min_temperature: Lower bound of the temperatures, greater than 0.
        temperature_range: Difference between upper and lower bound of the temperatures, greater than 0.
        reversal: Factor of the reversed gradient, at least 0; for a curriculum see `CTKD`.
        hidden_dim: Number of hidden units, at least 1.

    Raises:
        ValueError: If `min_temperature` or `temperature_range` is not greater than 0, if `reversal` is negative, or if
            `hidden_dim` is less than 1.

    References:
        Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023 (arXiv 2211.16231), instance-wise
        temperature. The paper does not specify the number of hidden units and the initialization used here. The MLP
        reads detached logits, so the student receives gradients from the divergence only. The loss function in the
        authors' README adds 1e-7 to the probabilities, and lkd does not: the effect on the student's gradient is
        negligible, but the small gradient of the MLP changes by up to 160 %.
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
        check_positive("the paper uses 20", temperature_range=temperature_range)
        check_weights(reversal=reversal)
        self.temperature_range = temperature_range
        self.reversal = reversal
        self.hidden_dim = hidden_dim

    @property
    def name(self) -> str:
        """Name in logs, shared with `CTKD`."""
        return "ctkd"

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the MLP."""
        num_logits = student.outputs.logits.shape[1] + teacher.outputs.logits.shape[1]
        last = nn.Linear(self.hidden_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(num_logits, self.hidden_dim), nn.ReLU(), last)

    @check_shapes(student_logits="B K", teacher_logits="B K")
    def temperatures(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Predict one temperature per sample.

        Args:
            student_logits: Student logits `(B, K)`.
            teacher_logits: Teacher logits `(B, K)`.

        Returns:
            Temperatures `(B, 1)`; their gradient reaches the MLP reversed.
        """
        theta = self.mlp(torch.cat([student_logits, teacher_logits], dim=1).detach())
        return _adversarial_temperature(wide(theta), self.min_temperature, self.temperature_range, self.reversal)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `kd_loss` with one temperature per sample."""
        return kd_loss(student.logits, teacher.logits, self.temperatures(student.logits, teacher.logits))
