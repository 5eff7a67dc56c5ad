"""Fusion of layers in frozen networks, for faster inference."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lkd import devices
from lkd._compat import AnyBatchNorm
from lkd.features.extractor import logits_of

_TOLERANCE = 1e-3


def fold_batch_norms(
    network: nn.Module,
    example: Tensor,
    dtype: torch.dtype | None = None,
    join: bool = False,
    read: Callable[[Any], Tensor] = logits_of,
) -> nn.Module:
    """Return a copy of a network in eval mode with each BatchNorm folded into the convolution before it.

    In eval mode, BatchNorm is an affine map of each channel, which can be absorbed into the weights and bias of the
    convolution. This saves one read and one write of the layer's output.

    Args:
        network: Network in eval mode.
        example: Input `(B, ...)` on the device of the network, for which the outputs of the copy are verified.
        dtype: 16-bit dtype of autocast. If given, the weights of convolutions and linear layers are converted once
            instead of in each step, with the same result.
        join: Whether to fuse each convolution with a subsequent addition and ReLU into one operation.
        read: Function that extracts the logits from the output of the network, such as `Task.logits`.

    Returns:
        The copy, whose outputs differ from those of the network by rounding only.

    Raises:
        ValueError: If there is no BatchNorm after a convolution, `torch.fx` cannot trace the network (its forward pass
            depends on values), or the outputs of the copy differ.
    """
    try:
        folded: torch.fx.GraphModule = fuse(network)  # type: ignore[assignment]
    except Exception as error:  # tracing runs the network's code with proxies for tensors, which may raise anything
        raise ValueError(f"it cannot be traced: {' '.join(str(error).split())[:100]}") from error
    if _batch_norms(folded) == _batch_norms(network):
        raise ValueError("it has no BatchNorm after a convolution")
    if join:
        join_activations(folded)
    with torch.no_grad():
        expected, found = read(network(example)), read(folded(example))
    if not torch.allclose(expected, found, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
        raise ValueError(f"its logits differ by {float((expected - found).abs().max()):.2g} after folding")
    folded = folded.requires_grad_(False).eval()
    return folded if dtype is None else _Autocast(folded, dtype)


class _Autocast(nn.Module):
    """A network under autocast, with the weights of convolutions and linear layers already in the autocast dtype."""

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
    return sum(isinstance(module, AnyBatchNorm) for module in called)


def join_activations(network: torch.fx.GraphModule) -> int:
    """Fuse each convolution with a subsequent addition and ReLU into one operation (`lkd.devices.conv_relu`).

    Args:
        network: Traced network, modified in place.

    Returns:
        Number of fused convolutions.
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
    """Return whether a node calls a plain convolution with a bias, as produced by folding."""
    layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return (
        type(layer) is nn.Conv2d
        and layer.bias is not None
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
