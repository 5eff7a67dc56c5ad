"""Comparison of several networks on the same images: accuracy, cost, and significance of the differences."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import combinations

import lightning as L
import torch

from lkd import devices
from lkd.__about__ import __version__
from lkd.compare.cost import costs
from lkd.compare.groups import groups_of, method_difference
from lkd.compare.measurements import Measurements
from lkd.compare.metrics import difference, measure
from lkd.compare.predictions import Candidate, Predictions, Split, predict
from lkd.compare.tables import tables


class Comparison(Measurements):
    """Result of `compare`; shown as tables in a notebook."""

    def _repr_markdown_(self) -> str:
        """Return the tables for a notebook."""
        shown = (table for table in tables(self) if table.place != "folded")
        return "\n".join(line for table in shown for line in table.markdown())


def compare(
    candidates: Sequence[Candidate],
    data: L.LightningDataModule,
    teacher: str | None = None,
    split: Split = "test",
    batch_sizes: Sequence[int] = (1, 64),
    accelerator: str = "auto",
    seconds: float = 1.0,
    progress: bool = False,
) -> Comparison:
    """Compare networks on one split of a dataset.

    Args:
        candidates: Networks with unique names.
        data: Data module that provides the images.
        teacher: Name of the network with which the others are compared; None if there is no teacher.
        split: `test`, or `val` for the validation images.
        batch_sizes: Batch sizes for the measurement of latency and throughput.
        accelerator: Device, as in `lightning.Trainer`.
        seconds: Duration of the measurement for each network and batch size, in seconds.
        progress: Whether to show a progress bar.

    Returns:
        The comparison.

    Raises:
        ValueError: If names are not unique, the teacher is not among them, or a network does not fit the data.
    """
    names = [one.name for one in candidates]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"the networks to compare must have unique names, got {', '.join(names) or 'none'}")
    if teacher is not None and teacher not in names:
        raise ValueError(f"the teacher must be one of the networks {', '.join(names)}, got {teacher!r}")
    if not batch_sizes:
        raise ValueError("batch_sizes must contain at least one batch size, got none")
    predictions = predict(candidates, data, split, teacher, accelerator, progress=progress)
    reference = None if teacher is None else predictions.logits[teacher]
    figures = {
        name: measure(logits, predictions.target, None if name == teacher else reference)
        for name, logits in predictions.logits.items()
    }
    cost = costs(
        {one.name: one.network for one in candidates}, predictions.example, batch_sizes, predictions.device, seconds
    )
    pairs = [
        difference(one, other, predictions.logits[one], predictions.logits[other], predictions.target)
        for one, other in combinations(names, 2)
    ]
    groups = groups_of({one.name: one.group for one in candidates}, figures)
    classes = next(iter(predictions.logits.values())).shape[1]
    given = getattr(data, "class_names", None)
    found = [] if given is None else [str(name) for name in given]
    class_names = [found[one] if one < len(found) else str(one) for one in range(classes)]
    facts = _facts(candidates, data, split, predictions)
    between = [method_difference(*pair) for pair in combinations(groups, 2)]
    return Comparison(figures, cost, pairs, groups, between, teacher, facts, predictions, class_names, data)


def _facts(
    candidates: Sequence[Candidate], data: L.LightningDataModule, split: Split, predictions: Predictions
) -> dict[str, str]:
    device = predictions.device
    where = f"{device.type}, {platform.machine()}" if device.type == "cpu" else devices.name_of(device)
    return {
        "data": f"{place_of(data)}, {split} split, {len(predictions.target):,} images",
        "device": f"{where}, float32, {torch.get_num_threads()} thread(s)",
        "versions": f"lkd {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        **{f"network {one.name}": one.source for one in candidates if one.source},
    }


def place_of(data: L.LightningDataModule) -> str:
    """Return the class of a data module and, if it has one, its root folder.

    Args:
        data: The data module.
    """
    root = getattr(data, "root", None)
    return f"{type(data).__name__}{f' ({root})' if root else ''}"
