"""Memories of unit vectors: ring buffers that all processes update identically."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(tensor: Tensor) -> Tensor:
    """Concatenate detached tensors `(B, ...)` of all processes."""
    tensor = tensor.detach()
    if num_processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(num_processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def new_memory(num_rings: int, size: int, feat_dim: int) -> Tensor:
    """Create ring buffers of random unit vectors, identical in all processes.

    Args:
        num_rings: Number of rings.
        size: Number of rows of a ring.
        feat_dim: Number of values in a row.

    Returns:
        Memory `(num_rings, size, feat_dim)`.
    """
    start = torch.Generator().manual_seed(0)  # processes may have different seeds
    rows = torch.randn(num_rings, size, feat_dim, generator=start, device="cpu")
    return torch.nn.functional.normalize(rows, dim=2)


def enqueue(memory: Tensor, pointer: Tensor, rows: Tensor, count: Tensor) -> None:
    """Write rows to each ring, in place.

    If the rows reach the end of a ring, all of them are written to its last positions, and its pointer returns to the
    start.

    Args:
        memory: Rings `(K, M, D)`.
        pointer: Position of the next row in each ring `(K,)`, int64.
        rows: New rows `(K, J, D)`, with J at most M.
        count: Number of valid new rows `(K,)`, int64; the valid rows come first.
    """
    size, number = memory.shape[1], torch.arange(rows.shape[1], device=rows.device)
    is_full = pointer + count >= size
    start = torch.where(is_full, size - count, pointer).unsqueeze(1)
    place = ((start + number) % size).unsqueeze(2).expand_as(rows)  # distinct, since the order of writes is undefined
    valid = (number < count.unsqueeze(1)).unsqueeze(2)
    memory.scatter_(1, place, torch.where(valid, rows.to(memory.dtype), memory.gather(1, place)))
    pointer.copy_(torch.where(is_full, 0, pointer + count))


def drawn(size: int, count: int, device: torch.device) -> Tensor:
    """Draw distinct integers from 0 to `size` - 1.

    Args:
        size: Number of integers to draw from.
        count: Number of integers to draw. If `size` is smaller, all are returned, in random order.
        device: Device of the result.

    Returns:
        Integers `(min(count, size),)`, int64.
    """
    return torch.rand(size, device=device).topk(min(count, size)).indices
