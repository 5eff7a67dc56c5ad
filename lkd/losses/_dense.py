"""Dense prediction: maps of logits or features, and the labels of their pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._labels import label_error
from lkd.losses.base import DistillLoss
from lkd.types import IGNORE_INDEX, Outputs


def enlarged(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate the smaller of two maps to the size of the larger one (bilinear, `align_corners=False`).

    Args:
        student: Student map `(B, C, H, W)`.
        teacher: Teacher map `(B, D, H', W')`.

    Returns:
        Both maps with max(H, H') rows and max(W, W') columns.
    """
    height, width = (max(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return interpolated(student, (height, width)), interpolated(teacher, (height, width))


def interpolated(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate a map to `size` (bilinear, `align_corners=False`); return it unchanged if it has that size.

    Args:
        values: Map `(B, C, H, W)`.
        size: Rows and columns.

    Returns:
        Map `(B, C, *size)`.
    """
    if values.shape[2:] == size:
        return values
    return F.interpolate(values, size, mode="bilinear", align_corners=False)


def resized_labels(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks to `size` by nearest neighbor; the source of row i is floor(i * H / size[0]).

    Args:
        target: Class of each pixel `(B, H, W)`, int64, or `IGNORE_INDEX`.
        size: Rows and columns.

    Returns:
        Masks `(B, *size)`, int64.
    """
    if target.shape[1:] == size:
        return target
    rows, columns = (
        torch.arange(new, device=target.device) * old // new for new, old in zip(size, target.shape[1:], strict=True)
    )
    return target[:, rows[:, None], columns]


def maps(criterion: DistillLoss, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return the maps that a criterion compares: the features of its layers, or the logits if it has no layers.

    Args:
        criterion: Criterion with as many `student_layers` as `teacher_layers`, or none.
        student: Outputs of the student.
        teacher: Outputs of the teacher.

    Returns:
        Pairs of maps `(B, C, H, W)` and `(B, D, H', W')`.

    Raises:
        ValueError: If the numbers of layers differ, or if a feature or the logits are not a map.
    """
    if criterion.student_layers or criterion.teacher_layers:
        return criterion.pairs(student, teacher, dims=4)
    return [logit_maps(criterion, student, teacher)]


def logit_maps(criterion: DistillLoss, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Return the logits of both networks.

    Args:
        criterion: Criterion, for the error message.
        student: Outputs of the student.
        teacher: Outputs of the teacher.

    Returns:
        Maps of logits `(B, K, H, W)`.

    Raises:
        ValueError: If the logits are not a map.
    """
    return logit_map(criterion, "student", student), logit_map(criterion, "teacher", teacher)


def logit_map(criterion: DistillLoss, name: str, outputs: Outputs) -> Tensor:
    """Return the logits `(B, K, H, W)` of a network.

    Args:
        criterion: Criterion, for the error message.
        name: Name of the network in the error message.
        outputs: Its outputs.

    Raises:
        ValueError: If the logits are not a map.
    """
    logits = outputs.logits
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        got = str(tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(criterion).__name__} reads maps of logits (B, K, H, W), but the {name} returns {got}; use a "
            "network for segmentation, or set layers that return feature maps"
        )
    return logits


def class_masks(target: Tensor, num_classes: int) -> Tensor:
    """Return a mask for each class.

    Args:
        target: Class of each pixel `(B, H, W)`, int64, or `IGNORE_INDEX`.
        num_classes: Number of classes K.

    Returns:
        Whether a pixel has a class `(B, K, H, W)`, bool; false for all classes if it has no label.

    Raises:
        ValueError: If a label is out of range (on the CPU; on a GPU, a device-side assertion fails).
    """
    labelled = (target != IGNORE_INDEX).unsqueeze(1)
    own = target.unsqueeze(1).masked_fill(~labelled, 0)
    masks = torch.zeros(len(target), num_classes, *target.shape[1:], dtype=torch.bool, device=target.device)
    try:
        return masks.scatter(1, own, labelled)
    except (IndexError, RuntimeError) as error:  # a comparison would synchronize with the GPU
        raise label_error(num_classes, error) from error
