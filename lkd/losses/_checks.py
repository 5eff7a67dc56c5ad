"""Validation of constructor arguments and of input shapes."""

from __future__ import annotations

import math

from torch import Tensor


def check_temperature(temperature: float, name: str = "temperature") -> float:
    """The temperature, as a float.

    Args:
        temperature: What a user set.
        name: The setting's name.

    Raises:
        ValueError: If it is not greater than 0 and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{name} must be greater than 0, got {temperature}; 1 leaves the teacher's probabilities as they are, "
            "larger finite values flatten them (4 is usual)"
        )
    return float(temperature)


def check_weights(**weights: float) -> None:
    """Say which weight is negative, or no finite number.

    Args:
        weights: Name to weight.

    Raises:
        ValueError: If one is.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must not be negative, got {weight}; take a finite number from 0 on")


def check_positive(usual: str, **values: float) -> None:
    """Say which setting is not greater than 0, or no finite number.

    Args:
        usual: What to take instead.
        values: Name to value.

    Raises:
        ValueError: If one is.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {value}; take a finite number, {usual}")


def check_classes(logits: Tensor, least: int, because: str) -> None:
    """Say that there are too few classes.

    Args:
        logits: `(B, K)`.
        least: How many a criterion needs.
        because: What for.

    Raises:
        ValueError: If there are fewer.
    """
    if logits.shape[1] < least:
        remedy = "take KD" if logits.shape[1] > 1 else "let the network have a logit for each class"
        raise ValueError(
            f"this criterion {because}, which needs at least {least} classes; the logits have {logits.shape[1]}: "
            f"{remedy}"
        )


def check_dims(owner: str, dims: int, **features: Tensor) -> None:
    """Say which layer has not the form that a criterion reads.

    Args:
        owner: The criterion's name.
        dims: 4: feature maps `(B, C, H, W)`; 3: tokens `(B, N, C)`; 2: pooled features `(B, C)`.
        features: What to call a feature, and the feature.

    Raises:
        ValueError: If one has another number of dimensions.
    """
    forms = {4: "feature maps (B, C, H, W)", 3: "tokens (B, N, C)", 2: "pooled features (B, C)"}
    for name, feature in features.items():
        if feature.ndim != dims:
            raise ValueError(
                f"{owner} reads {forms[dims]}; the {name} layer returns {tuple(feature.shape)}: name another layer"
            )
