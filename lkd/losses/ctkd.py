"""A temperature that is learned against the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkd.losses.base import DistillLoss
from lkd.losses.logit import _check_temperature, kd_loss
from lkd.types import Batch, Outputs


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
        ValueError: If a temperature is not greater than 0.

    References:
        Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023 (arXiv 2211.16231), with the global
        temperature, which the defaults keep between 1 and 21, as the authors' code does; its lambda is `-reversal`.

    Example:
        >>> round(CTKD().temperature.item(), 4)
        15.6212
    """

    def __init__(self, min_temperature: float = 1.0, temperature_range: float = 20.0, reversal: float = 1.0) -> None:
        super().__init__()
        if not temperature_range > 0:
            raise ValueError(f"temperature_range must be greater than 0, got {temperature_range}; the paper takes 20")
        self.min_temperature = _check_temperature(min_temperature)
        self.temperature_range = temperature_range
        self.reversal = reversal
        self.theta = nn.Parameter(torch.ones(1))  # (1,): FSDP takes no parameters without a dimension

    @property
    def temperature(self) -> Tensor:
        """The temperature now, a scalar; its gradient reaches theta reversed."""
        fixed = self.theta.detach()
        theta = fixed - self.reversal * (self.theta - fixed)  # theta itself; its derivative is -reversal
        return (self.min_temperature + self.temperature_range * theta.sigmoid()).squeeze()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """`kd_loss` at the temperature learned so far."""
        return kd_loss(student.logits, teacher.logits, self.temperature)
