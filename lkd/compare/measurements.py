"""What is measured of several networks on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L

from lkd.compare.cost import Cost
from lkd.compare.groups import Group, MethodDifference, Spread
from lkd.compare.metrics import Difference, Figures, Share
from lkd.compare.predictions import Answers


@dataclass
class Measurements:
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
