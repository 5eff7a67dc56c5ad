"""What criteria refuse: settings out of range, and features of another form."""

from __future__ import annotations

from torch import Tensor


def check_temperature(temperature: float) -> float:
    """The temperature, as a float.

    Args:
        temperature: What a user set.

    Raises:
        ValueError: If it is not greater than 0.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature must be greater than 0, got {temperature}; 1 leaves the teacher's probabilities as they are, "
            "larger values flatten them (4 is usual)"
        )
    return float(temperature)


def check_weights(**weights: float) -> None:
    """Say which weight is negative.

    Args:
        weights: Name to weight.

    Raises:
        ValueError: If one is.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name} must not be negative, got {weight}; it weighs a term of the loss")


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
