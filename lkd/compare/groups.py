"""Groups of networks that differ only in their seed: results of a method, and differences between methods."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn
from scipy import stats

from lkd.checkpoints.find import config_of
from lkd.cli.seeds import training_settings
from lkd.io.yaml import load_yaml
from lkd.loading import Trained


@dataclass(frozen=True)
class Spread:
    """Values of a metric over the seeds of a method.

    Attributes:
        values: One value per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation of the values, with n - 1 in the denominator; NaN for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, from Student's t distribution; NaN for a single value."""
        n = len(self.values)
        half = float(stats.t.ppf(0.975, n - 1)) * self.std / math.sqrt(n) if n > 1 else math.nan
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Group:
    """Networks of one method, whose runs differ only in their seed.

    Attributes:
        name: Name of the method.
        members: Names of the networks.
        measures: Values over the seeds, by the name of the metric; the main metric comes first.
    """

    name: str
    members: tuple[str, ...]
    measures: dict[str, Spread]


@dataclass(frozen=True)
class MethodDifference:
    """Difference in the main metric between two methods over seeds, with Welch's t-test.

    Attributes:
        first: Name of the first method.
        second: Name of the second method.
        value: Mean of the first method minus that of the second, in [-1, 1].
        interval: 95 % confidence interval of the difference.
        t: Welch's t statistic; NaN if the values do not vary over the seeds.
        degrees: Degrees of freedom (Welch-Satterthwaite); NaN in the same case.
        p_value: Two-sided p-value; NaN in the same case.
    """

    first: str
    second: str
    value: float
    interval: tuple[float, float]
    t: float
    degrees: float
    p_value: float


class Measured(Protocol):
    """Metrics of a network."""

    def measures(self) -> dict[str, float]:
        """Return the scalar metrics by name, starting with the main metric."""


def groups_of(named: Mapping[str, str | None], metrics: Mapping[str, Measured]) -> list[Group]:
    """Create the groups with at least two networks.

    Args:
        named: Name of the group of each network, by the name of the network; None if it has no group.
        metrics: Metrics of each network, by name.
    """
    groups = []
    for name in dict.fromkeys(filter(None, named.values())):
        members = tuple(network for network, group in named.items() if group == name)
        found = [metrics[network].measures() for network in members]
        shared = [key for key in found[0] if all(key in one for one in found)]
        if len(members) > 1:
            groups.append(Group(name, members, {key: Spread(tuple(one[key] for one in found)) for key in shared}))
    return groups


def method_difference(first: Group, second: Group) -> MethodDifference:
    """Compare the main metric of two methods over their seeds.

    Args:
        first: First method.
        second: Second method.

    Returns:
        Difference of the means, with Welch's t-test, which allows different variances.

    References:
        Welch: The generalization of "Student's" problem when several different population variances are involved, 1947.
    """
    one, other = (next(iter(group.measures.values())) for group in (first, second))
    value = one.mean - other.mean
    if one.std == other.std == 0:  # the statistic would be a division by zero
        return MethodDifference(first.name, second.name, value, (value, value), math.nan, math.nan, math.nan)
    test = stats.ttest_ind(one.values, other.values, equal_var=False)
    low, high = test.confidence_interval(0.95)
    numbers = float(test.statistic), float(test.df), float(test.pvalue)
    return MethodDifference(first.name, second.name, value, (float(low), float(high)), *numbers)


def methods_of(runs: Mapping[str, Trained]) -> dict[str, str]:
    """Find the runs that differ only in their seed.

    Args:
        runs: Runs by name.

    Returns:
        Name of the group by the name of the run, for runs in a group. A second run with the same seed is in no group.
    """
    found: dict[str, dict[str, str]] = {}  # names of runs, by settings and seed
    for name, run in runs.items():
        config = load_yaml(config_of(run.path).read_text(encoding="utf-8"))
        settings, seed = json.dumps(training_settings(config), sort_keys=True, default=str), _seed(config)
        of_method = found.setdefault(f"{settings}, {'last' if run.path.stem in ('last', 'previous') else 'best'}", {})
        if seed in of_method:
            rank_zero_warn(
                f"{name} has the same settings and seed as {of_method[seed]}, so it does not count as another seed"
            )
        elif seed != "None":
            of_method[seed] = name
    groups: dict[str, str] = {}
    for members in (list(named.values()) for named in found.values() if len(named) > 1):
        groups |= dict.fromkeys(members, _group_name(members, {*runs, *groups.values()}))
    return groups


def _seed(config: Mapping[str, Any]) -> str:
    own = (config.get("data") or {}).get("init_args") or {}
    return (
        " ".join(str(seed) for seed in (config.get("seed_everything"), own.get("seed")) if seed is not None) or "None"
    )


def _group_name(members: Sequence[str], taken: set[str]) -> str:
    """Return the common prefix of the names of networks: kd for kd/version_0 and kd/version_1."""
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*members, strict=False))
    name = "".join(letters[0] for letters in shared)
    if all(member[len(name) :].isdigit() for member in members):  # kd10 and kd11 share kd1
        name = name.rstrip("0123456789")
    name = name.rstrip("_-./ ").removesuffix("version").removesuffix("seed").rstrip("_-./ ") or members[0]
    return f"{name} ({members[0]} to {members[-1]})" if name in taken else name
