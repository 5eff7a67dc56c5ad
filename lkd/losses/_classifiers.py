"""Access to a network's linear classifier."""

from __future__ import annotations

from torch import nn

from lkd.features.layers import resolve_layers
from lkd.types import Probe


def linear_classifier(owner: str, role: str, probe: Probe, layer: str, channels: int) -> nn.Linear:
    """Return a network's classifier: a single linear layer after global average pooling.

    Args:
        owner: Name of the criterion, for the error message.
        role: `student` or `teacher`, for the error message.
        probe: The network and its outputs.
        layer: Name of the classifier.
        channels: Number of channels of the feature map.

    Raises:
        ValueError: If the layer does not exist or is not a linear layer for this number of channels.
    """
    (name,) = resolve_layers(probe.network, [layer])
    head = dict(probe.network.named_modules()).get(name)
    if not isinstance(head, nn.Linear) or head.in_features != channels:
        found = "does not exist" if head is None else f"is {head}"
        raise ValueError(
            f"{owner} requires a {role} classifier that is a single linear layer after global average pooling; the "
            f"feature map has {channels} channels, but the layer {name!r} {found}; set another feature map "
            f"({role}_layer) or classifier ({role}_head)"
        )
    return head
