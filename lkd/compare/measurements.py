"""Measurements of several networks on the same images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import lightning as L

from lkd._moved import former_members
from lkd.compare.cost import Cost
from lkd.compare.grid import Grid
from lkd.compare.groups import Group, Measured, MethodDifference, Spread
from lkd.compare.metrics import Difference, Share
from lkd.compare.scores import ScoreDifference

F = TypeVar("F", bound=Measured)
D = TypeVar("D", Difference, ScoreDifference)


@former_members(figures="metrics")
@dataclass
class Measurements(ABC, Generic[F, D]):
    """Measurements of several networks.

    Attributes:
        metrics: Metrics of each network by name, in the order of the networks.
        costs: Cost of each network, by name.
        differences: Difference of each pair of networks.
        groups: Groups of networks that differ only in their seed.
        method_differences: Difference of each pair of groups, with Welch's t-test over the seeds.
        teacher: Name of the network with which the others are compared; None if there is no teacher.
        facts: Descriptions of the data, the device, the versions and the networks.
        class_names: Names of the classes.
        data: The data module.
        title: Main metric.
        class_title: Main metric of a class.
    """

    metrics: dict[str, F]
    costs: dict[str, Cost]
    differences: list[D]
    groups: list[Group]
    method_differences: list[MethodDifference]
    teacher: str | None
    facts: dict[str, str]
    class_names: Sequence[str]
    data: L.LightningDataModule
    title: str
    class_title: str

    @abstractmethod
    def tables(self, members: bool = False) -> list[Grid]:
        """Create all tables, most important first.

        Args:
            members: Whether to show the individual networks of groups in the terminal as well.
        """

    def _repr_markdown_(self) -> str:
        """Return the tables for a notebook."""
        shown = (table for table in self.tables() if table.place != "folded")
        return "\n".join(line for table in shown for line in table.markdown())

    def as_dict(self) -> dict[str, Any]:
        """Return the measurements as numbers, strings, lists and dicts: the content of `comparison.json`."""
        networks = {
            name: {"metrics": _plain(metrics), "cost": _plain(self.costs[name])}
            for name, metrics in self.metrics.items()
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
