"""Measurements of several networks on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L

from lkd._moved import former_members
from lkd.compare.cost import Cost
from lkd.compare.groups import Group, MethodDifference, Spread
from lkd.compare.metrics import Difference, Figures, Share
from lkd.compare.predictions import Predictions


@former_members(answers="predictions")
@dataclass
class Measurements:
    """Measurements of several networks.

    Attributes:
        figures: Metrics of each network by name, in the order of the networks.
        costs: Cost of each network, by name.
        differences: Difference of each pair of networks, with McNemar's test.
        groups: Groups of networks that differ only in their seed.
        method_differences: Difference of each pair of groups, with Welch's t-test over the seeds.
        teacher: Name of the network with which the others are compared; None if there is no teacher.
        facts: Descriptions of the data, the device, the versions and the networks.
        predictions: Logits of the networks, labels, and images with different predictions.
        class_names: Names of the classes.
        data: The data module.
    """

    figures: dict[str, Figures]
    costs: dict[str, Cost]
    differences: list[Difference]
    groups: list[Group]
    method_differences: list[MethodDifference]
    teacher: str | None
    facts: dict[str, str]
    predictions: Predictions
    class_names: Sequence[str]
    data: L.LightningDataModule

    def as_dict(self) -> dict[str, Any]:
        """Return the measurements as numbers, strings, lists and dicts: the content of `comparison.json`."""
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
    """Convert dataclasses to JSON types, including properties such as value, interval and throughput."""
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
