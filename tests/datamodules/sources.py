"""Data shared by several test files."""

from __future__ import annotations

from typing import Any

from lkd.datamodules import RandomCrop, RandomHorizontalFlip, SyntheticDataModule

SHUFFLED = [RandomCrop(2), RandomHorizontalFlip()]


def in_memory(shape: tuple[int, int, int] = (3, 9, 7), **settings: Any) -> SyntheticDataModule:
    """Return generated images of four classes with random crops and flips."""
    return SyntheticDataModule(4, shape, train_size=170, test_size=23, augment=SHUFFLED, **settings)
