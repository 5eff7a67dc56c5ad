"""Several networks on the same images: their accuracy, their cost, and which differences are significant."""

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
from lkd.compare.predictions import Answers, Candidate, Split, ask
from lkd.compare.tables import tables


class Comparison(Measurements):
    """Networks compared on the same images, as `compare` returns it; a notebook shows its tables."""

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
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
    """Compare networks on one split of one data set.

    Args:
        candidates: The networks, each with a name of its own.
        data: Brings the images.
        teacher: The name of the one that the others are compared with; None: there is none.
        split: `test`, or `val`: the validation images.
        batch_sizes: Images in the batches that are timed.
        accelerator: Lightning's word for the device.
        seconds: For how long each network is timed with each batch size.
        progress: Whether to show a progress bar.

    Returns:
        The comparison.

    Raises:
        ValueError: If names are not unique, the teacher is none of them, or a network does not fit the data.
    """
    names = [one.name for one in candidates]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"networks that are compared need names of their own, got {', '.join(names) or 'none'}")
    if teacher is not None and teacher not in names:
        raise ValueError(f"the teacher must be one of the networks {', '.join(names)}, got {teacher!r}")
    if not batch_sizes:
        raise ValueError("networks are timed with one batch size or more, got none")
    answers = ask(candidates, data, split, teacher, accelerator, progress=progress)
    reference = None if teacher is None else answers.logits[teacher]
    figures = {
        name: measure(logits, answers.target, None if name == teacher else reference)
        for name, logits in answers.logits.items()
    }
    cost = costs({one.name: one.network for one in candidates}, answers.example, batch_sizes, answers.device, seconds)
    pairs = [
        difference(one, other, answers.logits[one], answers.logits[other], answers.target)
        for one, other in combinations(names, 2)
    ]
    groups = groups_of({one.name: one.group for one in candidates}, figures)
    classes = next(iter(answers.logits.values())).shape[1]
    told = getattr(data, "class_names", None)
    found = [] if told is None else [str(name) for name in told]
    class_names = [found[one] if one < len(found) else str(one) for one in range(classes)]
    facts = _facts(candidates, data, split, answers)
    between = [method_difference(*pair) for pair in combinations(groups, 2)]
    return Comparison(figures, cost, pairs, groups, between, teacher, facts, answers, class_names, data)


def _facts(
    candidates: Sequence[Candidate], data: L.LightningDataModule, split: Split, answers: Answers
) -> dict[str, str]:
    device = answers.device
    where = f"{device.type}, {platform.machine()}" if device.type == "cpu" else devices.name_of(device)
    return {
        "data": f"{place_of(data)}, {split} split, {len(answers.target):,} images",
        "device": f"{where}, float32, {torch.get_num_threads()} thread(s)",
        "versions": f"lkd {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        **{f"network {one.name}": one.source for one in candidates if one.source},
    }


def place_of(data: L.LightningDataModule) -> str:
    """What data is called, and where it lies, if it tells.

    Args:
        data: The data module.
    """
    root = getattr(data, "root", None)
    return f"{type(data).__name__}{f' ({root})' if root else ''}"
