"""What a network costs: parameters, operations, bytes, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.benchmark import Measurement, Timer

from lkd.callbacks.monitor import network_size
from lkd.features.layers import evaluating


@dataclass(frozen=True)
class Time:
    """How long a forward pass takes.

    Attributes:
        batch_size: Images in the batch.
        median: Of the passes, in seconds.
        iqr: Distance of their quartiles, in seconds.
    """

    batch_size: int
    median: float
    iqr: float

    @property
    def throughput(self) -> float:
        """Images a second."""
        return self.batch_size / self.median


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Their number.
        flops: Floating point operations for one image; a multiplication with its addition counts as two.
        bytes: Size of its parameters and buffers, as they are.
        times: One for each batch size.
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
    """Measure what networks cost; their passes are timed in turn, so that a disturbance meets all of them.

    Args:
        networks: Name to network; given back as it was.
        example: Inputs `(B, ...)`, or a structure of such; repeated or cut to each batch size.
        batch_sizes: Images in a batch.
        device: Where it is timed.
        seconds: For how long each network is timed with each batch size.
        rounds: Turns into which these seconds are divided.

    Returns:
        Name to cost.
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
    """A network in eval mode on a device; afterwards as it was."""
    home = next((parameter.device for parameter in network.parameters()), device)
    with evaluating(network):
        network.to(device)
        try:
            yield
        finally:
            network.to(home)


def resized(example: Any, size: int) -> Any:
    """Inputs of another batch size, by repeating or cutting.

    Args:
        example: `(B, ...)`, or a structure of such.
        size: The batch size.
    """
    given = next(len(leaf) for leaf in tree_leaves(example) if isinstance(leaf, Tensor))
    index = torch.arange(size) % given
    return tree_map(lambda leaf: leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, example)


def _timed(network: nn.Module, batch: Any, seconds: float) -> Measurement:
    with torch.inference_mode():
        names = {"network": network, "batch": batch}
        timer = Timer("network(batch)", globals=names, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds)


def _time(size: int, parts: list[Measurement]) -> Time:
    (merged,) = Measurement.merge(parts)
    return Time(size, float(merged.median), float(merged.iqr))
