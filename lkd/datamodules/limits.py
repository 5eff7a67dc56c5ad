"""The number of evaluated images if the trainer limits the batches."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn

Evaluated = Literal["val", "test"]
_NAMES = {"val": "validation images", "test": "test images"}


def is_limited(trainer: L.Trainer | None, split: Evaluated) -> bool:
    """Return whether a trainer evaluates only some batches of a split.

    Args:
        trainer: The trainer, if there is one.
        split: The evaluated split.

    Returns:
        True with `limit_val_batches`, `limit_test_batches`, `fast_dev_run`, or a sanity check of a few batches.
    """
    limits: list[int | float] = [getattr(trainer, f"limit_{split}_batches", 1.0)]
    if trainer is not None and split == "val" and _is_fitting(trainer):
        limits.append(trainer.num_sanity_val_steps or math.inf)
    return any(isinstance(limit, int) or limit < 1 for limit in limits)


def _is_fitting(trainer: L.Trainer) -> bool:
    state = getattr(trainer, "state", None)  # a substitute in tests or notebooks may have none
    return state is not None and state.fn == TrainerFn.FITTING


def images_measured(trainer: L.Trainer, split: Evaluated) -> str:
    """Describe the images of an evaluation: the whole split, or a part of it.

    Args:
        trainer: The trainer, during or after the evaluation.
        split: The evaluated split.

    Returns:
        `the validation images`; or, if batches are limited, `320 of 5,000 validation images`, or `10 batches of the
        validation images` if the number of images is unknown.
    """
    batches, loaders = _batches(trainer, split), getattr(trainer, f"{split}_dataloaders")
    loader: Any = loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders
    available = None if isinstance(loader, (list, tuple, dict)) else sized_len(loader)
    if not math.isfinite(batches) or (available is not None and batches >= available):
        return f"the {_NAMES[split]}"
    size, images = getattr(loader, "batch_size", None), sized_len(getattr(loader, "dataset", None))
    if not size or not images:
        return f"{batches} {'batch' if batches == 1 else 'batches'} of the {_NAMES[split]}"
    return f"{min(int(batches) * size * trainer.world_size, images):,} of {images:,} {_NAMES[split]}"


def _batches(trainer: L.Trainer, split: Evaluated) -> int | float:
    """Return the number of evaluated batches; infinity if it is unknown."""
    if split == "test":
        found = trainer.num_test_batches
    else:
        found = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return sum(found) if found else math.inf
