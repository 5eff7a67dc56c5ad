"""Channel relations of cross-image relational distillation, version 2 (CIRKDV2)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._adapters import projection_head
from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._dense import enlarged, interpolated
from lkd.losses._divergence import softened_kl
from lkd.losses._memory import drawn, enqueue, gathered, new_memory, num_processes
from lkd.losses._precision import full_precision, mse, wide
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss
from lkd.losses.cirkd import cross_image_kl
from lkd.types import Batch, Outputs, Probe


def _units(feature: Tensor) -> Tensor:
    """Return the channels of a map as unit vectors `(B, C, H * W)`."""
    return unit_vectors(feature.flatten(2), dim=2)


@check_shapes(student_feature="B C H W", teacher_feature="B C H W")
@full_precision
def cirkd_channel_loss(student_feature: Tensor, teacher_feature: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of each channel with the channels of every image.

    $$ \frac{1}{B^2 C} \sum_{m, n, c} \mathrm{KL}(\mathrm{softmax}(S^t_{mn, c \cdot} / \tau) \,\|\,
       \mathrm{softmax}(S^s_{mn, c \cdot} / \tau)), \quad S_{mn, c d} = \cos(F_{mc}, F_{nd}) $$

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, C, H, W)`.
        temperature: Softmax temperature $\tau$ of the similarities, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Yang et al.: CIRKDV2, technical report, 2025, and the authors' code.

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> cirkd_channel_loss(feature, 3 * feature).item() < 1e-6
        True
    """
    return cross_image_kl(_units(student_feature), _units(teacher_feature), temperature)


@check_shapes(student_feature="B C H W", teacher_feature="B C H W", keys="M H W")
@full_precision
def cirkd_channel_memory_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    keys: Tensor,
    temperature: float = 0.1,
    kd_temperature: float = 1.0,
) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of each channel with the keys of a memory.

    $$ \frac{T^2}{B C} \sum_{i, c} \mathrm{KL}(\mathrm{softmax}(V \hat F^t_{ic} / (\tau T)) \,\|\,
       \mathrm{softmax}(V \hat F^s_{ic} / (\tau T))) $$

    V are the keys, and $\hat F$ channels of unit length.

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, C, H, W)`.
        keys: Rows of the memory, each a map of unit length `(M, H, W)`.
        temperature: Temperature $\tau$ of the similarities, greater than 0.
        kd_temperature: Softmax temperature T, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Yang et al.: CIRKDV2, technical report, 2025, and the authors' code.

    Example:
        >>> feature, keys = torch.rand(2, 8, 4, 4), torch.rand(6, 4, 4)
        >>> cirkd_channel_memory_loss(feature, 3 * feature, keys).item() < 1e-6
        True
    """
    student, teacher = (
        _units(feature).flatten(0, 1) @ keys.flatten(1).mT for feature in (student_feature, teacher_feature)
    )
    return kd_temperature**2 * softened_kl(student, teacher, temperature * kd_temperature).mean()


class CIRKDChannel(DistillLoss):
    """Channel relations of CIRKDV2: match similarities between channels of different images.

    Both maps are average-pooled, a projection head (1x1 convolution, BatchNorm, ReLU, 1x1 convolution) maps the
    student's channels to the teacher's, and each channel is a vector over the positions, normalized to unit length. The
    term `train/cirkdchannel_batch` compares the similarities between the channels of all images of a batch
    (`cirkd_channel_loss`), `train/cirkdchannel_memory` those with random keys from a memory of the teacher's channels
    (`cirkd_channel_memory_loss`), and `train/cirkdchannel_mse` is the mean squared error of the normalized channels.

    The memory is a ring that starts with random vectors. In training, up to `channels_per_step` random channels of the
    batch are stored in each step; in distributed training, all processes store those of all processes. It holds
    `memory_size` maps of the pooled size that the teacher returns for the blank image of `build`; other images' maps
    are interpolated to that size. If the maps of student and teacher differ in size, the smaller one is interpolated to
    the size of the larger one.

    Args:
        student_layer: Student layer whose feature map is compared.
        teacher_layer: Teacher layer whose feature map is compared.
        batch_weight: Weight of the similarities within the batch.
        memory_weight: Weight of the similarities with the memory.
        mse_weight: Weight of the mean squared error.
        temperature: Temperature of the similarities, greater than 0.
        kd_temperature: Softmax temperature of the term with the memory, greater than 0.
        memory_size: Number of channels that are stored.
        num_keys: Number of random channels of the memory that are compared in a step.
        channels_per_step: Maximum number of channels that are stored in a step.
        pool_size: Size of the average-pooling windows.

    Raises:
        ValueError: If a setting is out of range. At the start of training, if a layer does not return a feature map.

    References:
        Yang et al.: CIRKDV2, technical report, 2025. The weights are those of the authors' scripts, which add the terms
        of `CIRKD`, pixel-wise distillation and a regression of the feature map.
    """

    reads_logits = False
    compares_samples = True
    per_process = "similarities between the channels of its own images"
    same_everywhere: ClassVar[tuple[str, ...]] = ("memory", "pointer")
    memory: Tensor
    pointer: Tensor

    def __init__(
        self,
        student_layer: str = "@last_stage",
        teacher_layer: str = "@last_stage",
        batch_weight: float = 1.0,
        memory_weight: float = 0.1,
        mse_weight: float = 100.0,
        temperature: float = 0.1,
        kd_temperature: float = 1.0,
        memory_size: int = 10000,
        num_keys: int = 2048,
        channels_per_step: int = 256,
        pool_size: int = 4,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        check_weights(batch_weight=batch_weight, memory_weight=memory_weight, mse_weight=mse_weight)
        for name, value in (("num_keys", num_keys), ("channels_per_step", channels_per_step), ("pool_size", pool_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if memory_size < channels_per_step:
            raise ValueError(f"memory_size must be at least channels_per_step = {channels_per_step}, got {memory_size}")
        self.batch_weight = batch_weight
        self.memory_weight = memory_weight
        self.mse_weight = mse_weight
        self.temperature = check_temperature(temperature)
        self.kd_temperature = check_temperature(kd_temperature, "kd_temperature")
        self.memory_size = memory_size
        self.num_keys = num_keys
        self.channels_per_step = channels_per_step
        self.pool_size = pool_size

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the projection head and the memory."""
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.projection_head = projection_head(student_feature.shape[1], teacher_feature.shape[1])
        _, pooled = self._pooled(student_feature, teacher_feature)
        self.map_size = (pooled.shape[2], pooled.shape[3])
        self.register_buffer("memory", new_memory(1, self.memory_size, self.map_size[0] * self.map_size[1]))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def _pooled(self, student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return both maps, resized to the same size and average-pooled, with partial windows at the border."""
        student, teacher = (
            F.avg_pool2d(wide(feature), self.pool_size, ceil_mode=True)
            for feature in enlarged(student_feature, teacher_feature)
        )
        return student, teacher

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """In training, update the memory; then compute the three terms."""
        student_feature, teacher_feature = (
            interpolated(feature, self.map_size) for feature in self._pooled(*self.pairs(student, teacher)[0])
        )
        student_feature = self.projection_head(student_feature)
        if self.training:
            self._remember(_units(teacher_feature.detach()).flatten(0, 1))
        keys = self.memory[0, self.draw_rows()].view(-1, *self.map_size)
        memory_loss = cirkd_channel_memory_loss(
            student_feature, teacher_feature, keys, self.temperature, self.kd_temperature
        )
        return {
            "batch": self.batch_weight * cirkd_channel_loss(student_feature, teacher_feature, self.temperature),
            "memory": self.memory_weight * memory_loss,
            "mse": self.mse_weight * mse(_units(wide(student_feature)), _units(teacher_feature)),
        }

    def draw_rows(self) -> Tensor:
        """Draw the rows of the memory that are compared; override this method to change the sampling.

        Returns:
            Rows `(num_keys,)`, int64.
        """
        return drawn(self.memory_size, self.num_keys, self.memory.device)

    def draw_channels(self, num_channels: int) -> Tensor:
        """Draw the channels that are stored; override this method to change the sampling.

        Args:
            num_channels: Number of channels of all images.

        Returns:
            Channels `(J,)`, int64, with J at most `channels_per_step`.
        """
        share = max(self.channels_per_step // num_processes(), 1)
        return drawn(num_channels, share, self.memory.device)

    def _remember(self, rows: Tensor) -> None:
        """Store some of the teacher's channels `(B * C, H * W)`."""
        new = gathered(rows[self.draw_channels(len(rows))])[-self.memory_size :].unsqueeze(0)
        enqueue(self.memory, self.pointer, new, torch.full_like(self.pointer, new.shape[1]))
