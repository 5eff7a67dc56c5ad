"""A data loader that creates whole batches, and resumes within an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch.utils.data import BatchSampler, DataLoader

from lkd.datamodules.batch_graph import BatchGraph
from lkd.datamodules.batches import without_labels
from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.masks import MaskDataset
from lkd.datamodules.sampler import EpochSampler
from lkd.types import Batch


class Loader(DataLoader[Batch]):
    """Create whole batches without workers, and resume an epoch at the batch where it was interrupted.

    Workers start when the first batch is requested. Lightning creates the iterator of a resumed run before it calls
    `set_epoch`; workers that started then would read the first epoch again.
    """

    trainer: L.Trainer | None = None
    """Trainer that knows the position in a resumed epoch. It may restore it after the loader is created."""
    graph: BatchGraph | None = None
    """Graph that creates full batches on a GPU, if used."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state. Its presence enables mid-epoch resume; Lightning counts the batches."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Ignore the state, which is empty."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        begin = _batches_seen(self.trainer)
        size, sampler, dataset = self.batch_size or 0, self.sampler, self.dataset
        if isinstance(sampler, EpochSampler):
            sampler.begin = begin * size
        # For predict, Lightning replaces the batch sampler by one that records indices; users may replace the others.
        own = type(self.batch_sampler) is BatchSampler and self.collate_fn is identity
        direct = own and size and not (self.num_workers or self.pin_memory)
        known = type(dataset) in (ImageDataset, MaskDataset)  # a user's class may read single samples only
        if not (direct and type(sampler) is EpochSampler and known and isinstance(dataset, ImageDataset)):
            yield from super().__iter__()
            return
        epoch, dealt = sampler.epoch, sampler.deal()
        # All positions of the epoch are copied at once: a copy per batch would synchronize with the GPU.
        places = torch.split(dealt[0].to(dataset.index.device), size)
        has_padding = bool(dealt[1].any())
        for position, padding in zip(places, torch.split(dealt[1], size), strict=True):
            if len(position) == size or not self.drop_last:
                is_padded = has_padding and bool(padding.any())
                take = dataset.take if self.graph is None or is_padded else self.graph.take
                batch = take(epoch, position)
                yield without_labels(batch, padding) if is_padded else batch


def _batches_seen(trainer: L.Trainer | None) -> int:
    """Return the number of batches of the current epoch that a resumed run has already processed."""
    loop: Any = getattr(trainer, "fit_loop", None)
    if loop is None or not loop.restarting or loop.epoch_loop.batch_progress.is_last_batch:
        return 0
    return int(loop.epoch_loop.batch_progress.current.processed)


def identity(batch: Any) -> Any:
    """Return a batch that the dataset has already collated."""
    return batch
