"""What the networks share: how they start, and what they refuse."""

from __future__ import annotations

from torch import nn


def initialize_convolutions(network: nn.Module) -> None:
    """Draw the kernels as He et al. (2015, arXiv 1502.01852) do, by what goes out; biases start at zero.

    Args:
        network: Its convolutions are changed in place.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_counts(**counts: int | tuple[int, ...]) -> None:
    """Refuse counts below one.

    Args:
        counts: An argument's name to its value.

    Raises:
        ValueError: If a value, or a number in it, is below one.
    """
    for name, value in counts.items():
        if min(value if isinstance(value, tuple | list) else (value,)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
