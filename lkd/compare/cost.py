"""Cost of a network: parameters, FLOPs, bytes and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

from lkd._compat import tree_leaves, tree_map
from lkd.callbacks.monitor import network_size
from lkd.features.layers import evaluating


@dataclass(frozen=True)
class Time:
    """Duration of a forward pass.

    Attributes:
        batch_size: Number of images in the batch.
        median: Median duration, in seconds.
        iqr: Interquartile range of the duration, in seconds.
    """

    batch_size: int
    median: float
    iqr: float

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.batch_size / self.median


@dataclass(frozen=True)
class Cost:
    """Cost of a network.

    Attributes:
        parameters: Number of parameters.
        flops: Floating-point operations for one image, where a multiply-add counts as two; None if unknown.
        bytes: Size of the parameters and buffers in their own data types.
        times: Duration of a forward pass for each batch size.
    """

    parameters: int
    flops: int | None
    bytes: int
    times: list[Time]


def costs(
    networks: Mapping[str, nn.Module],
    example: Any,
    batch_sizes: Sequence[int],
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    rounds: int = 4,
) -> dict[str, Cost]:
    """Measure the cost of networks.

    The networks are timed in alternation, so that disturbances affect all of them.

    Args:
        networks: Networks by name. Their device and mode are restored.
        example: Inputs `(B, ...)`, or a structure of them; repeated or truncated to each batch size.
        batch_sizes: Numbers of images in a batch.
        device: Device of the measurement.
        seconds: Duration of the measurement for each network and batch size, in seconds.
        rounds: Number of rounds into which this duration is divided.

    Returns:
        Cost of each network, by name.
    """
    example = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
    measured: dict[tuple[str, int], list[Measurement]] = {}
    found = {}
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(_ready(network, device))
        for _, size in product(range(rounds), batch_sizes):
            batch = resized(example, size)
            for name, network in networks.items():
                measured.setdefault((name, size), []).append(_timed(network, batch, seconds / rounds))
        for name, network in networks.items():
            times = [_time(size, measured[name, size]) for size in batch_sizes]
            counted = network_size(name, network, resized(example, 1))
            tensors = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
            held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            found[name] = Cost(counted.parameters, counted.flops, held, times)
    return found


@contextmanager
def _ready(network: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Move a network to a device in eval mode, and restore its device and mode afterwards."""
    home = next((parameter.device for parameter in network.parameters()), device)
    with evaluating(network):
        network.to(device)
        try:
            yield
        finally:
            network.to(home)


def resized(example: Any, size: int) -> Any:
    """Repeat or truncate inputs to a batch size.

    Args:
        example: Inputs `(B, ...)`, or a nested structure of them.
        size: Batch size of the result.
    """
    index = torch.arange(size) % size_of(example)
    return tree_map(lambda leaf: leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, example)


def size_of(example: Any) -> int:
    """Return the batch size of inputs.

    Args:
        example: Inputs `(B, ...)`, or a nested structure of them.
    """
    return next(len(leaf) for leaf in tree_leaves(example) if isinstance(leaf, Tensor))


def _timed(network: nn.Module, batch: Any, seconds: float) -> Measurement:
    with torch.inference_mode():
        names = {"network": network, "batch": batch}
        timer = Timer("network(batch)", globals=names, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds)


def _time(size: int, parts: list[Measurement]) -> Time:
    (merged,) = Measurement.merge(parts)
    return Time(size, float(merged.median), float(merged.iqr))
