"""Frozen networks, made cheaper to run."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lkd import devices
from lkd.features.extractor import logits_of

_TOLERANCE = 1e-3


def fold_batch_norms(
    network: nn.Module, example: Tensor, dtype: torch.dtype | None = None, join: bool = False
) -> nn.Module:
    """A copy of a network in eval mode in which each batch norm behind a convolution is part of the convolution.

    A batch norm that no longer learns multiplies and adds by channel; so do a convolution's weights and bias. That
    saves reading and writing each such layer's output once more.

    Args:
        network: In eval mode.
        example: An input `(B, ...)` on the network's device, of which the copy must say the same.
        dtype: A type of 16 bits in which autocast multiplies: the weights of convolutions and linear layers are then
            converted once, with the same result, instead of in each step.
        join: Whether each convolution becomes one operation with the addition and the ReLU behind it, if any.

    Returns:
        The copy; what it returns differs by rounding.

    Raises:
        ValueError: If the network cannot be traced (`torch.fx`: its forward pass depends on values), or the copy says
            something else.
    """
    try:
        folded: torch.fx.GraphModule = fuse(network)  # type: ignore[assignment]
    except Exception as error:  # tracing runs the network's own code with stand-ins for tensors: it may raise anything
        raise ValueError(f"it cannot be traced: {' '.join(str(error).split())[:100]}") from error
    if _batch_norms(folded) == _batch_norms(network):
        raise ValueError("it has no batch norm behind a convolution")
    if join:
        join_activations(folded)
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


def join_activations(network: torch.fx.GraphModule) -> int:
    """Replace each convolution, with the addition and the ReLU behind it, by one operation (`lkd.devices.conv_relu`).

    Args:
        network: A traced network; changed in place.

    Returns:
        The number of replaced convolutions.
    """
    graph, joined = network.graph, 0
    order = {node: number for number, node in enumerate(graph.nodes)}
    for relu in [node for node in graph.nodes if _is_relu(network, node)]:
        (before,) = relu.args[:1]
        added: list[Any] = []
        if before.op == "call_function" and before.target in _ADDITIONS and len(before.users) == 1:
            added = [part for part in before.args if isinstance(part, torch.fx.Node)]
        candidates = [node for node in added or [before] if _is_convolution(network, node) and len(node.users) == 1]
        if not candidates or (added and len(added) != 2):
            continue
        conv = max(candidates, key=order.__getitem__)
        others = [part for part in added if part is not conv]
        layer: Any = network.get_submodule(str(conv.target))
        with graph.inserting_before(relu):
            weight, bias = (graph.get_attr(f"{conv.target}.{name}") for name in ("weight", "bias"))
            settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
            new = graph.call_function(devices.conv_relu, (conv.args[0], weight, bias, *settings, *others))
        relu.replace_all_uses_with(new)
        for old in (relu, *([before] if added else []), conv):
            graph.erase_node(old)
        joined += 1
    network.recompile()
    return joined


_ADDITIONS = (operator.add, operator.iadd, torch.add)


def _is_relu(network: nn.Module, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))) is nn.ReLU
    return (node.op == "call_function" and node.target in (F.relu, torch.relu)) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_convolution(network: nn.Module, node: torch.fx.Node) -> bool:
    """Whether a node calls a plain convolution with a bias, as folding leaves it."""
    layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return (
        type(layer) is nn.Conv2d
        and layer.bias is not None
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
