"""Validation of constructor arguments and of input shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lkd.types import Predictions

_SAME_AREA = 0.01
"""Largest relative difference of the areas that feature maps cover; rounding during resizing remains below it."""


def check_temperature(temperature: float, name: str = "temperature") -> float:
    """Check a temperature.

    Args:
        temperature: Value to check.
        name: Name of the argument, for the error message.

    Returns:
        The temperature as a float.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{name} must be greater than 0, got {temperature}; use a finite number: 1 keeps the probabilities "
            "unchanged, larger values flatten them (typically 4)"
        )
    return float(temperature)


def check_weights(**weights: float) -> None:
    """Check that weights are non-negative and finite.

    Args:
        weights: Weights by argument name.

    Raises:
        ValueError: If a weight is negative or not finite.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must not be negative, got {weight}; use a finite number of at least 0")


def check_positive(usual: str, **values: float) -> None:
    """Check that values are positive and finite.

    Args:
        usual: Typical value, for the error message.
        values: Values by argument name.

    Raises:
        ValueError: If a value is not positive or not finite.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {value}; use a finite number, {usual}")


def check_classes(logits: Tensor, least: int, because: str) -> None:
    """Check the number of classes.

    Args:
        logits: Logits `(B, K)`.
        least: Minimum number of classes.
        because: Reason for the requirement, for the error message.

    Raises:
        ValueError: If there are fewer classes.
    """
    if logits.shape[1] < least:
        remedy = "use KD" if logits.shape[1] > 1 else "use a network with one logit per class"
        raise ValueError(
            f"this criterion {because}, which requires at least {least} classes, got logits with "
            f"{logits.shape[1]}; {remedy}"
        )


def check_dims(owner: str, dims: int, **features: Tensor) -> None:
    """Check the number of dimensions of features.

    Args:
        owner: Name of the criterion, for the error message.
        dims: 4 for feature maps `(B, C, H, W)`, 3 for tokens `(B, N, C)`, 2 for pooled features `(B, C)`.
        features: Features by role, for example `student`.

    Raises:
        ValueError: If a feature has another number of dimensions.
    """
    forms = {4: "feature maps (B, C, H, W)", 3: "tokens (B, N, C)", 2: "pooled features (B, C)"}
    for name, feature in features.items():
        if not isinstance(feature, Tensor) or feature.ndim != dims:
            got = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise ValueError(f"{owner} reads {forms[dims]}, but the {name} layer returns {got}; use another layer")


def check_same_areas(owner: str, student: object, teacher: object) -> None:
    """Check that the feature maps of two detectors cover the same area, so that their positions correspond.

    Args:
        owner: Name of the criterion, for the error message.
        student: What the student returned; only the `Predictions` of detectors are checked.
        teacher: What the teacher returned.

    Raises:
        ValueError: If a side differs by more than 1 %.
    """
    if not isinstance(student, Predictions) or not isinstance(teacher, Predictions):
        return
    for areas in zip(student.areas, teacher.areas, strict=True):
        if any(abs(own - other) > _SAME_AREA * other for own, other in zip(*areas, strict=True)):
            shown = " and ".join(f"{height:.0f}x{width:.0f}" for height, width in areas)
            raise ValueError(
                f"{owner} compares features at the same positions, but those of student and teacher cover areas of "
                f"{shown} pixels of an image, because the detectors resize or pad it differently; use the same sizes "
                "and the same `size_divisible` in `network.transform` of both, or images whose sides are multiples of "
                "the larger one"
            )


def layer_list(name: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Check that layers are given as a list.

    Args:
        name: Name of the argument, for the error message.
        layers: Layer names.

    Returns:
        The names as a tuple.

    Raises:
        TypeError: If they are a single string.
    """
    if isinstance(layers, str):
        raise TypeError(f"{name} must be a list of layer names, got {layers!r}; use [{layers!r}]")
    return tuple(layers)
