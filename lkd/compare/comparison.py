"""Several networks on the same images: their accuracy, their cost, and which differences are significant."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import lightning as L
import torch

from lkd import __version__, devices
from lkd.compare.asking import Answers, Candidate, Split, ask
from lkd.compare.cost import Cost, costs
from lkd.compare.figures import Difference, Figures, Share, difference, measure
from lkd.compare.groups import Group, MethodDifference, Spread, groups_of, method_difference


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        figures: Name to what its answers say, in the order of the networks.
        costs: Name to what it costs.
        differences: Each pair of networks, with McNemar's test.
        groups: Networks that differ only by seed.
        method_differences: Each pair of groups, with Welch's t-test over the seeds.
        teacher: The network that the others are compared with, if there is one.
        facts: Of what, on what and with what this was measured.
        answers: The networks' logits, the labels, and images on which they disagree.
        class_names: The classes' names.
        data: The data module.
    """

    figures: dict[str, Figures]
    costs: dict[str, Cost]
    differences: list[Difference]
    groups: list[Group]
    method_differences: list[MethodDifference]
    teacher: str | None
    facts: dict[str, str]
    answers: Answers
    class_names: Sequence[str]
    data: L.LightningDataModule

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain numbers, texts, lists and dicts: what `comparison.json` holds."""
        networks = {
            name: {"figures": _plain(figures), "cost": _plain(self.costs[name])}
            for name, figures in self.figures.items()
        }
        pairs = [{**_plain(one), "difference": one.value} for one in self.differences]
        return {
            "facts": self.facts,
            "teacher": self.teacher,
            "class_names": list(self.class_names),
            "networks": networks,
            "differences": pairs,
            "groups": {group.name: _plain(group) for group in self.groups},
            "method_differences": [{**_plain(one), "difference": one.value} for one in self.method_differences],
        }

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        from lkd.compare.tables import tables  # it imports this file

        shown = (table for table in tables(self) if table.place != "folded")
        return "\n".join(line for table in shown for line in table.markdown())


def _plain(value: Any) -> Any:
    """A dataclass as JSON can hold it: a share brings its value and interval, a time its throughput."""
    if isinstance(value, Share):
        low, high = value.interval
        return _plain({**asdict(value), "value": value.value, "low": low, "high": high})
    if isinstance(value, Spread):
        low, high = value.interval
        return _plain({**asdict(value), "mean": value.mean, "std": value.std, "low": low, "high": high})
    if hasattr(value, "__dataclass_fields__"):
        named = {name: getattr(value, name) for name in value.__dataclass_fields__}
        if hasattr(value, "throughput"):
            named["throughput"] = value.throughput
        return _plain(named)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
