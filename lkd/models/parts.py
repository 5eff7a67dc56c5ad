"""Initialization and argument checks shared by the networks."""

from __future__ import annotations

from torch import nn


def initialize_convolutions(network: nn.Module) -> None:
    """Initialize convolutions as in He et al. (2015, arXiv 1502.01852) with `fan_out`, and their biases with zero.

    Args:
        network: Network whose convolutions are initialized in place.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_counts(**counts: int | tuple[int, ...]) -> None:
    """Check that counts are at least 1.

    Args:
        counts: Mapping from names of arguments to their values.

    Raises:
        ValueError: If a value, or an element of a tuple, is less than 1.
    """
    for name, value in counts.items():
        if min(value if isinstance(value, tuple | list) else (value,)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
