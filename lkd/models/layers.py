"""Which layers of a network can be read."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def layer_names(network: nn.Module, example: Any = None) -> dict[str, tuple[int, ...]]:
    """Name the layers that can be tapped, with the shapes of what they return.

    The network runs once, in eval mode and without gradients; its modes and statistics stay as they were.

    Args:
        network: Any module.
        example: What the network takes; None stands for a blank image of 32x32 pixels, with the channels that its
            first convolution takes.

    Returns:
        Name, as in `network.named_modules()`, to shape, in the network's order. Layers that the pass does not reach,
        or that return something other than a tensor, are left out; of several calls the last counts.

    Raises:
        ValueError: If there is no example and no convolution either.

    Example:
        >>> layer_names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))
        {'0': (1, 8, 30, 30), '1': (1, 7200)}
    """
    if example is None:
        example = _blank_image(network)
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in network.named_modules():
            stack.callback(setattr, layer, "training", layer.training)
            stack.callback(layer.register_forward_hook(partial(_record, shapes, name)).remove)
        network.eval()
        network(example)
    return {name: shapes[name] for name, _ in network.named_modules() if name and name in shapes}


def _record(shapes: dict[str, tuple[int, ...]], name: str, layer: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        shapes[name] = tuple(output.shape)


def _blank_image(network: nn.Module) -> Tensor:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.new_zeros(1, module.in_channels, 32, 32)
    raise ValueError(f"{type(network).__name__} has no convolution that tells which images it takes; give an example")
