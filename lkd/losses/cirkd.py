"""Cross-image relational distillation (CIRKD)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._adapters import projection_head
from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._dense import class_masks, enlarged, logit_map, resized_labels
from lkd.losses._divergence import kl_divergence
from lkd.losses._labels import labelled_mean
from lkd.losses._memory import drawn, enqueue, gathered, new_memory
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs, Probe

_LARGE = 2**30  # bytes


def cross_image_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean divergence of the similarities between the rows of all ordered pairs of images.

    Args:
        student: Unit vectors of the student `(B, R, C)`: R rows for each image.
        teacher: Unit vectors of the teacher `(B, R, D)`.
        temperature: Softmax temperature of the similarities.

    Returns:
        Scalar: mean over all rows and images of the divergence between the row's distributions over the image's rows.
    """
    all_rows = (student.flatten(0, 1), teacher.flatten(0, 1))
    # the rows are divided by the temperature, because there are fewer of them than of similarities
    scores = (((rows / temperature) @ rows.mT).view(-1, student.shape[1]) for rows in all_rows)
    student_log_probs, teacher_log_probs = map(log_softmax, scores)
    return kl_divergence(student_log_probs, teacher_log_probs).mean()


@check_shapes(student_feature="B C H W", teacher_feature="B D H W")
@full_precision
def cirkd_batch_loss(student_feature: Tensor, teacher_feature: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of each pixel with the pixels of every image of the batch.

    $$ \frac{1}{B^2 H W} \sum_{m, n, p} \mathrm{KL}(\mathrm{softmax}(S^t_{mn, p \cdot} / \tau) \,\|\,
       \mathrm{softmax}(S^s_{mn, p \cdot} / \tau)), \quad S_{mn, p q} = \cos(f_{mp}, f_{nq}) $$

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        temperature: Softmax temperature $\tau$ of the similarities, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Yang et al.: Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022 (arXiv
        2204.06986), mini-batch-based pixel-to-pixel distillation.

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> cirkd_batch_loss(feature, 3 * feature).item() < 1e-6
        True
    """
    student, teacher = (unit_vectors(values.flatten(2), dim=1).mT for values in (student_feature, teacher_feature))
    return cross_image_kl(student, teacher, temperature)


@check_shapes(student_embedding="B D H W", teacher_feature="B D H W", keys="M D", target="B H W")
@full_precision
def cirkd_memory_loss(
    student_embedding: Tensor,
    teacher_feature: Tensor,
    keys: Tensor,
    target: Tensor,
    temperature: float = 0.1,
    kd_temperature: float = 1.0,
) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of each pixel with the keys of a memory.

    $$ \frac{T^2}{|L|} \sum_{p \in L} \mathrm{KL}(\mathrm{softmax}(V \hat f^t_p / (\tau T)) \,\|\,
       \mathrm{softmax}(V \hat f^s_p / (\tau T))) $$

    L are the pixels with a label, V the keys, and $\hat f$ features of unit length. The loss is 0 without any label.

    Args:
        student_embedding: Student features, projected to the teacher's channels `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        keys: Rows of the memory, of unit length `(M, D)`.
        target: Class of each pixel `(B, H, W)`, or `IGNORE_INDEX`.
        temperature: Temperature $\tau$ of the similarities, greater than 0.
        kd_temperature: Softmax temperature T, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Yang et al.: Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022 (arXiv
        2204.06986), memory-based pixel-to-pixel and pixel-to-region distillation.

    Example:
        >>> feature, keys, target = torch.rand(2, 8, 4, 4), torch.rand(6, 8), torch.zeros(2, 4, 4, dtype=torch.int64)
        >>> cirkd_memory_loss(feature, 3 * feature, keys, target).item() < 1e-6
        True
    """
    scaled = keys / (temperature * kd_temperature)
    student_log_probs, teacher_log_probs = (
        log_softmax(unit_vectors(values.flatten(2), dim=1).mT.flatten(0, 1) @ scaled.mT)
        for values in (student_embedding, teacher_feature)
    )
    divergence = kl_divergence(student_log_probs, teacher_log_probs)
    return kd_temperature**2 * labelled_mean(divergence, target.flatten())


class CIRKD(DistillLoss):
    """Cross-image relational distillation: match similarities between pixels of different images.

    The term `train/cirkd_batch` compares the similarities between the pixels of all images of a batch
    (`cirkd_batch_loss`). Two further terms compare each labelled pixel with keys from memories of the teacher's
    features (`cirkd_memory_loss`): `train/cirkd_pixel` with pixels and `train/cirkd_region` with regions, that is, the
    mean features of the pixels of one class in one image. A projection head, a 1x1 convolution with BatchNorm, ReLU and
    another 1x1 convolution, maps the student's features to the teacher's channels for these two terms.

    Each class has a ring of pixels and one of regions, which start with random vectors. In training, a region and up to
    `pixels_per_image` random pixels of each class and image are stored in each step. The memories hold `num_classes *
    sum(memory_size) * D` values on each device, for D channels of the teacher, and are saved in checkpoints. In
    distributed training, all processes store the features of all processes. With the weights `pixel_weight=0,
    region_weight=0`, there are neither memories nor a projection head.

    If the maps differ in size, the smaller one is interpolated to the size of the larger one. Masks are resized to the
    maps by nearest neighbor.

    Args:
        student_layer: Student layer whose feature map is compared.
        teacher_layer: Teacher layer whose feature map is compared.
        batch_weight: Weight of the similarities within the batch.
        pixel_weight: Weight of the similarities with the memory of pixels.
        region_weight: Weight of the similarities with the memory of regions.
        temperature: Temperature of the similarities, greater than 0.
        kd_temperature: Softmax temperature of the two terms with memories, greater than 0.
        memory_size: Numbers of pixels and of regions that are stored for each class, the former at least
            `pixels_per_image`.
        num_keys: Numbers N of random pixels and of random regions that are compared in a step, N // num_classes + 1 of
            each class.
        pixels_per_image: Maximum number of pixels that are stored for each class and image.
        pool_size: Size of the average-pooling windows for the similarities within the batch, which take (B * H * W)²
            values; 1 disables pooling.

    Raises:
        ValueError: If a setting is out of range, or all weights are 0. At the start of training, if a layer does not
            return a feature map. In `forward`, if a label is out of range (on the CPU; on a GPU, a device-side
            assertion fails).

    References:
        Yang et al.: Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022 (arXiv
        2204.06986). The weights are those of the authors for Cityscapes, in addition to pixel-wise distillation with
        the weight 1. Their code stores random pixels of the image, whatever their class, in the ring of a class; this
        class stores pixels of that class, as in the paper.
    """

    reads_logits = False
    compares_samples = True
    per_process = "similarities between the pixels of its own images"
    skips_unlabelled = None
    same_everywhere: ClassVar[tuple[str, ...]] = ("pixel_memory", "pixel_pointer", "region_memory", "region_pointer")
    pixel_memory: Tensor
    pixel_pointer: Tensor
    region_memory: Tensor
    region_pointer: Tensor

    def __init__(
        self,
        student_layer: str = "@last_stage",
        teacher_layer: str = "@last_stage",
        batch_weight: float = 1.0,
        pixel_weight: float = 0.1,
        region_weight: float = 0.1,
        temperature: float = 0.1,
        kd_temperature: float = 1.0,
        memory_size: tuple[int, int] = (20000, 2000),
        num_keys: tuple[int, int] = (4096, 1024),
        pixels_per_image: int = 16,
        pool_size: int = 1,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        check_weights(batch_weight=batch_weight, pixel_weight=pixel_weight, region_weight=region_weight)
        if batch_weight == pixel_weight == region_weight == 0:
            raise ValueError("batch_weight, pixel_weight and region_weight are all 0; set at least one of them above 0")
        for name, value in (("pixels_per_image", pixels_per_image), ("pool_size", pool_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if memory_size[0] < pixels_per_image or min(*memory_size, *num_keys) < 1:
            raise ValueError(
                "memory_size must be at least (pixels_per_image, 1) and num_keys at least (1, 1), got "
                f"{memory_size} and {num_keys}; pixels_per_image is {pixels_per_image}"
            )
        self.batch_weight = batch_weight
        self.pixel_weight = pixel_weight
        self.region_weight = region_weight
        self.temperature = check_temperature(temperature)
        self.kd_temperature = check_temperature(kd_temperature, "kd_temperature")
        self.memory_size = memory_size
        self.num_keys = num_keys
        self.pixels_per_image = pixels_per_image
        self.pool_size = pool_size

    @property
    def _weights(self) -> tuple[float, float]:
        """Weights of the terms with memories."""
        return self.pixel_weight, self.region_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the projection head and the memories."""
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        if not any(self._weights):
            return
        channels, num_classes = teacher_feature.shape[1], logit_map(self, "student", student.outputs).shape[1]
        self.projection_head = projection_head(student_feature.shape[1], channels)
        named = zip(("pixel", "region"), self._weights, self.memory_size, strict=True)
        sizes = {name: size for name, weight, size in named if weight}
        size = 4 * num_classes * sum(sizes.values()) * channels
        if size > _LARGE:
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn(
                f"CIRKD keeps memories of {num_classes} x {sum(sizes.values())} x {channels} values, "
                f"{size / 2**30:.1f} GiB on each device and in each checkpoint; reduce memory_size to save memory"
            )
        for name, rows in sizes.items():
            self.register_buffer(f"{name}_memory", new_memory(num_classes, rows, channels))
            self.register_buffer(f"{name}_pointer", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """In training, update the memories; then compute the terms."""
        ((student_feature, teacher_feature),) = self.pairs(student, teacher)
        student_feature, teacher_feature = enlarged(student_feature, teacher_feature)
        terms = {}
        if self.batch_weight:
            pooled_student, pooled_teacher = (
                F.avg_pool2d(wide(values), self.pool_size, ceil_mode=True)
                for values in (student_feature, teacher_feature)
            )
            terms["batch"] = self.batch_weight * cirkd_batch_loss(pooled_student, pooled_teacher, self.temperature)
        if not any(self._weights):
            return terms
        target = resized_labels(batch.target, (student_feature.shape[2], student_feature.shape[3]))
        masks = class_masks(target, student.logits.shape[1])
        if self.training:
            self._remember(teacher_feature.detach(), masks)
        embedding = self.projection_head(student_feature)
        for name, weight, keys in self._keys():
            loss = cirkd_memory_loss(embedding, teacher_feature, keys, target, self.temperature, self.kd_temperature)
            terms[name] = weight * loss
        return terms

    def _keys(self) -> list[tuple[str, float, Tensor]]:
        """Return name, weight and keys `(M, D)` of the terms with memories."""
        found = []
        for name, weight, number in zip(("pixel", "region"), self._weights, self.num_keys, strict=True):
            if weight:
                memory = getattr(self, f"{name}_memory")
                index = self.draw_rows(memory, number // len(memory) + 1)
                found.append((name, weight, memory[:, index].flatten(0, 1)))
        return found

    def draw_rows(self, memory: Tensor, count: int) -> Tensor:
        """Draw the rows of a memory to compare with, the same for all classes; override this to change the sampling.

        Args:
            memory: Memory `(K, M, D)`.
            count: Number of rows of each class, at most M.

        Returns:
            Rows `(count,)`, int64.
        """
        return drawn(memory.shape[1], count, memory.device)

    def draw_pixels(self, masks: Tensor) -> Tensor:
        """Draw the pixels that are stored; override this method to change the sampling.

        Args:
            masks: Whether a pixel has a class `(B, K, H * W)`, bool.

        Returns:
            Pixels of each image and class `(B, K, J)`, int64. If a class has fewer than J pixels, its own come first.
        """
        order = torch.rand(len(masks), 1, masks.shape[2], device=masks.device)
        count = min(self.pixels_per_image, masks.shape[2])
        return torch.where(masks, order, 2.0).topk(count, largest=False).indices

    @full_precision
    def _remember(self, feature: Tensor, masks: Tensor) -> None:
        """Store teacher features `(B, D, H, W)` of pixels and regions, given the masks `(B, K, H, W)`."""
        units, masks = unit_vectors(feature.flatten(2), dim=1), masks.flatten(2)
        if self.pixel_weight:
            index = self.draw_pixels(masks)
            rows = units.gather(2, index.flatten(1).unsqueeze(1).expand(-1, units.shape[1], -1))
            rows = rows.mT.view(*index.shape, -1)
            count = masks.sum(2).clamp(max=index.shape[2])
            for image in zip(gathered(rows), gathered(count), strict=True):
                enqueue(self.pixel_memory, self.pixel_pointer, *image)
        if self.region_weight:
            rows = unit_vectors(units @ masks.mT.to(units.dtype), dim=1).mT.unsqueeze(2)
            for image in zip(gathered(rows), gathered(masks.any(2).long()), strict=True):
                enqueue(self.region_memory, self.region_pointer, *image)
