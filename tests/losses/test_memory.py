"""Memories of features are ring buffers."""

from __future__ import annotations

import torch

from lkd.losses._memory import enqueue


def test_ring_buffer_wraps_around() -> None:
    memory, pointer = torch.zeros(2, 5, 1), torch.tensor([3, 0])
    rows = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    enqueue(memory, pointer, rows, torch.tensor([3, 2]))
    assert memory.squeeze(2).tolist() == [[0, 0, 1, 2, 3], [4, 5, 0, 0, 0]]
    assert pointer.tolist() == [0, 2]
    enqueue(memory, pointer, rows, torch.tensor([0, 3]))
    assert memory.squeeze(2).tolist() == [[0, 0, 1, 2, 3], [4, 5, 4, 5, 6]]
    assert pointer.tolist() == [0, 0]
