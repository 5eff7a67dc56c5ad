"""Operations on batches: joining views, removing labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkd.types import IGNORE_INDEX, Batch, Mixed


def joined(views: Sequence[Batch]) -> Batch:
    """Join the views of the same images to one batch; see `Batch.views`.

    Args:
        views: One batch per view.
    """
    parts = [(view.input, view.target, view.index, view.version) for view in views]
    image, target, index, version = (torch.cat(part) for part in zip(*parts, strict=True))
    return Batch(image, target, index, len(views), version, _joined_mixed(views))


def without_labels(batch: Batch, padding: Tensor) -> Batch:
    """Remove the labels of padding samples.

    Args:
        batch: A batch.
        padding: Which samples only pad the batch `(B,)`, bool, on the CPU.
    """
    if not padding.any():  # always the case in training
        return batch
    unlabelled = padding.to(batch.target.device).repeat(batch.views)
    unlabelled = unlabelled.view(-1, *[1] * (batch.target.ndim - 1))
    return batch._replace(target=batch.target.masked_fill(unlabelled, IGNORE_INDEX))


def _joined_mixed(views: Sequence[Batch]) -> Mixed | None:
    if all(view.mixed is None for view in views):
        return None
    parts = [view.mixed or Mixed.none(view.target) for view in views]
    target, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    return Mixed(target, weight)
