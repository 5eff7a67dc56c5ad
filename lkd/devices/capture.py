"""Capture of a function of static tensors, so that the device can replay it without the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lkd._compat import copy_tensors, tree_flatten, tree_leaves

T = TypeVar("T")


class Capture(Protocol):
    """Protocol of a mechanism that records the operations of a function on a device.

    A captured function takes no arguments. It reads and writes tensors that exist before and after it, at fixed
    addresses. Every Python number that it reads is recorded as a constant. It must not synchronize with the device.

    Attributes:
        scalar: Type of a tensor that holds a Python number which changes between replays, such as a learning rate.
    """

    scalar: torch.dtype

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run a function in the same way as during capture, so that libraries allocate their workspaces.

        Args:
            function: The function.
        """

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], Any]]:
        """Record a function.

        Args:
            function: The function. Whether recording also executes it is unspecified.

        Returns:
            The function's result, whose tensors each replay overwrites, and a function that replays it.

        Raises:
            RuntimeError: If the function does something that cannot be recorded.
        """


class CudaCapture:
    """Capture as CUDA graphs."""

    scalar = torch.float32  # type of a learning rate on the device in fused optimizers

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run a function on a side stream, as PyTorch requires before a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], Any]]:
        """Record a CUDA graph; nothing is executed."""
        # With autocast, the graph would read weights that were cast outside of it, in memory that is soon freed.
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        # CUDA calls of other threads (pinning memory, writing logs) must not invalidate the capture.
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.clear_autocast_cache()  # now contains tensors of the graph
        return result, graph.replay


class Snapshot:
    """Copies of tensors, to undo changes made by a trial.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        with torch.no_grad():
            self.copies = [tensor.detach().clone() for tensor in self.tensors]

    def restore(self) -> None:
        """Copy the saved values back into the tensors."""
        with torch.no_grad():
            copy_tensors(self.tensors, self.copies)


def flat(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Concatenate copies of tensors to one vector per dtype, so that a few operations process them all.

    Args:
        tensors: The tensors, on one device.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
    return [torch.cat(parts) for parts in by_type.values()]


def signature(tree: Any) -> tuple[Any, ...]:
    """Return what must be equal in all inputs of a graph: shapes, dtypes and devices of tensors, and all other values.

    Args:
        tree: Tensors in tuples, lists and dicts.
    """
    leaves, structure = tree_flatten(tree)
    described = [
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    ]
    return (structure, *described)


def copy_into(static: Any, tree: Any) -> None:
    """Copy tensors into the static tensors that a graph reads.

    Args:
        static: The static tensors.
        tree: Tensors of the same `signature`. Tensors that are static tensors themselves are not copied.
    """
    if tree is static:
        return
    for own, new in zip(tree_leaves(static), tree_leaves(tree), strict=True):
        if isinstance(own, Tensor) and own is not new:
            own.copy_(new, non_blocking=True)
