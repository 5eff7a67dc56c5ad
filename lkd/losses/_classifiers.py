"""Access to a network's linear classifier."""

from __future__ import annotations

from torch import nn

from lkd.layers import resolve_layers
from lkd.types import Probe


def linear_classifier(owner: str, role: str, probe: Probe, layer: str, channels: int) -> nn.Linear:
    """A network's classifier, which must be one linear layer behind the mean of its map over the pixels."""
    (name,) = resolve_layers(probe.network, [layer])
    head = dict(probe.network.named_modules()).get(name)
    if not isinstance(head, nn.Linear) or head.in_features != channels:
        found = "is not there" if head is None else f"is {head}"
        raise ValueError(
            f"{owner} needs a classifier that is one linear layer and reads the mean of the {role}'s map over the "
            f"pixels; the map has {channels} channels, and the layer {name!r} {found}: name another map ({role}_layer) "
            f"or classifier ({role}_head)"
        )
    return head
