"""Inputs of a teacher that was trained with a different normalization than the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkd.types import Normalization


class InputNormalizer:
    """Affine map from inputs with the normalization of the data to inputs of the teacher.

    Args:
        mean: Mean of each channel in the normalization of the data.
        std: Standard deviation of each channel.
        teacher: Normalization that the teacher was trained with.
        device: Device of the networks.

    Attributes:
        scale: Multiplier `(1, C, 1, 1)`.
        shift: Offset `(1, C, 1, 1)`.

    Raises:
        ValueError: If the normalization of the data is not known, or the numbers of channels differ.
    """

    def __init__(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, teacher: Normalization, device: torch.device
    ) -> None:
        if mean is None or std is None:
            raise ValueError(
                "teacher_normalization requires the normalization of the data; use a data module with `mean` and `std`"
            )
        if len(mean) != len(teacher.mean):
            raise ValueError(
                f"teacher_normalization has {len(teacher.mean)} channels, but the data has {len(mean)}; set one mean "
                "and one std per channel"
            )
        data_mean, data_std, teacher_mean, teacher_std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std, teacher.mean, teacher.std)
        )
        self.scale, self.shift = data_std / teacher_std, (data_mean - teacher_mean) / teacher_std

    def __call__(self, input: Tensor) -> Tensor:
        """Convert an input `(B, C, H, W)` of the student to one of the teacher."""
        return input * self.scale + self.shift

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the constants, as `nn.Module._apply` does with parameters."""
        self.scale, self.shift = fn(self.scale), fn(self.shift)
