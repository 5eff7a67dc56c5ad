"""Frozen networks, made cheaper to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lkd.taps import logits_of

_TOLERANCE = 1e-3


def fold_batch_norms(network: nn.Module, example: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network in eval mode in which each batch norm behind a convolution is part of the convolution.

    A batch norm that no longer learns multiplies and adds by channel; so do a convolution's weights and bias. That
    saves reading and writing each such layer's output once more.

    Args:
        network: In eval mode.
        example: An input `(B, ...)` on the network's device, of which the copy must say the same.
        dtype: A type of 16 bits in which autocast multiplies: the weights of convolutions and linear layers are then
            converted once, with the same result, instead of in each step.

    Returns:
        The copy; what it returns differs by rounding.

    Raises:
        ValueError: If the network cannot be traced (`torch.fx`: its forward pass depends on values), or the copy says
            something else.
    """
    try:
        folded = fuse(network)
    except Exception as error:  # tracing runs the network's own code with stand-ins for tensors: it may raise anything
        raise ValueError(f"it cannot be traced: {' '.join(str(error).split())[:100]}") from error
    if _batch_norms(folded) == _batch_norms(network):
        raise ValueError("it has no batch norm behind a convolution")
    with torch.no_grad():
        said, says = logits_of(network(example)), logits_of(folded(example))
    if not torch.allclose(said, says, rtol=_TOLERANCE, atol=_TOLERANCE * float(said.abs().max())):
        raise ValueError(f"folded, its logits differ by {float((said - says).abs().max()):.2g}")
    folded = folded.requires_grad_(False).eval()
    return folded if dtype is None else _Autocast(folded, dtype)


class _Autocast(nn.Module):
    """A network under autocast, whose weights for matrix products are already of the type in which it multiplies."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(dtype)

    def forward(self, input: Tensor) -> Any:
        with torch.autocast(input.device.type, self.dtype):
            return self.network(input)


def _batch_norms(network: Any) -> int:
    if isinstance(network, torch.fx.GraphModule):
        called = [network.get_submodule(str(node.target)) for node in network.graph.nodes if node.op == "call_module"]
    else:
        called = list(network.modules())
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in called)
