"""Inputs of a teacher that was trained with another normalization than the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkd.types import Normalization


def renormalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, teacher: Normalization, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute the affine map from inputs with the normalization of the data to inputs of the teacher.

    Args:
        mean: Mean of each channel in the normalization of the data.
        std: Standard deviation of each channel.
        teacher: Normalization that the teacher was trained with.
        device: Device of the networks.

    Returns:
        Scale and shift `(1, C, 1, 1)`: the teacher's input is `scale * input + shift`.

    Raises:
        ValueError: If the normalization of the data is not known, or the numbers of channels differ.
    """
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
    return data_std / teacher_std, (data_mean - teacher_mean) / teacher_std
