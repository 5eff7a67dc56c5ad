"""Boxes whose four sides are predicted as distributions over distances (generalized focal loss)."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._divergence import softened_kl


def rows(values: Tensor) -> Tensor:
    """Return the positions of a map as rows.

    Args:
        values: Map `(B, C, H, W)`.

    Returns:
        Rows `(B * H * W, C)`.
    """
    return values.movedim(1, 3).flatten(0, 2)


def box_divergence(student_boxes: Tensor, teacher_boxes: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the distributions of a box, summed over its sides.

    Args:
        student_boxes: Logits of the student's distributions `(N, 4 * M)`: M distances of each of the four sides.
        teacher_boxes: Logits of the teacher's distributions `(N, 4 * M)`.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Divergences in nats `(N,)`, multiplied by temperature².
    """
    distances = student_boxes.shape[1] // 4
    student, teacher = (boxes.reshape(-1, distances) for boxes in (student_boxes, teacher_boxes))
    return temperature**2 * softened_kl(student, teacher, temperature).view(-1, 4).sum(1)


def check_boxes(owner: str, student: Tensor, teacher: Tensor) -> None:
    """Check that two maps contain distributions of boxes over the same number of distances.

    Args:
        owner: Name of the criterion, for the error message.
        student: Student map.
        teacher: Teacher map.

    Raises:
        ValueError: If the numbers of channels differ, are not a multiple of four, or are four, that is, a single
            distance, to which the softmax always assigns a probability of 1.
    """
    channels, teacher_channels = student.shape[1], teacher.shape[1]
    if channels != teacher_channels or channels % 4 or channels == 4:
        raise ValueError(
            f"{owner} compares distributions of boxes, 4 * (reg_max + 1) channels in student and teacher, got "
            f"{channels} and {teacher_channels}; use the layers that predict them, and the same reg_max in both "
            "networks"
        )
