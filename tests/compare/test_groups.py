"""Means, intervals and tests over seeds, and tables and plots of many networks."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import t as student

from lkd import SyntheticDataModule
from lkd.compare import Candidate, Comparison, compare
from lkd.compare.groups import Group, Spread, _group_name, method_difference, methods_of
from lkd.compare.plots import style
from lkd.compare.tables import tables, verdict

NAMES = ["teacher", *(f"kd/version_{n}" for n in range(4)), *(f"dkd/version_{n}" for n in range(3)), "alone"]


@pytest.fixture(scope="module")
def nine() -> Comparison:
    """Return a comparison of a teacher, two methods with several seeds each, and one more network."""
    data = SyntheticDataModule(num_classes=10, input_shape=(1, 4, 4), train_size=20, test_size=200, batch_size=100)
    candidates = []
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
        candidates.append(Candidate(name, network, group=name.partition("/")[0] if "/" in name else None))
    return compare(candidates, data, "teacher", seconds=0.01, accelerator="cpu")


def test_mean_standard_deviation_and_interval_of_five_seeds() -> None:
    spread = Spread((0.91, 0.93, 0.92, 0.95, 0.90))
    assert spread.mean == pytest.approx(0.922)
    assert spread.std == pytest.approx(np.std(spread.values, ddof=1))
    half = 2.7764451051977987 * spread.std / math.sqrt(5)  # 97.5 % quantile of t with 4 degrees of freedom
    assert spread.interval == pytest.approx((0.922 - half, 0.922 + half))
    assert math.isnan(Spread((0.9,)).std)
    assert math.isnan(Spread((0.9,)).interval[0])


def test_welchs_test_equals_its_definition() -> None:
    ours, theirs = np.array([0.91, 0.93, 0.92, 0.95]), np.array([0.88, 0.92, 0.80])
    groups = [Group(name, (), {"top1": Spread(tuple(values))}) for name, values in (("a", ours), ("b", theirs))]
    found = method_difference(*groups)
    parts = [values.var(ddof=1) / len(values) for values in (ours, theirs)]
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    statistic = (ours.mean() - theirs.mean()) / math.sqrt(sum(parts))
    half = student.ppf(0.975, degrees) * math.sqrt(sum(parts))
    assert (found.t, found.degrees) == pytest.approx((statistic, degrees))
    assert found.p_value == pytest.approx(2 * student.sf(abs(statistic), degrees))
    assert found.interval == pytest.approx((found.value - half, found.value + half))
    same = Group("c", (), {"top1": Spread((0.5, 0.5))})
    assert math.isnan(method_difference(same, same).p_value)


def test_means_of_groups(nine) -> None:
    assert [(group.name, len(group.members)) for group in nine.groups] == [("kd", 4), ("dkd", 3)]
    top1s = [nine.metrics[name].top1.value for name in NAMES[1:5]]
    assert nine.groups[0].measures["top1"].values == tuple(top1s)
    assert [(one.first, one.second) for one in nine.method_differences] == [("kd", "dkd")]
    found = nine.as_dict()
    assert found["groups"]["kd"]["measures"]["top1"]["mean"] == pytest.approx(np.mean(top1s))
    assert found["groups"]["kd"]["measures"]["top1"]["std"] == pytest.approx(np.std(top1s, ddof=1))
    assert found["method_differences"][0]["difference"] == nine.method_differences[0].value


def test_rows_are_groups_and_single_networks(nine) -> None:
    first, of_networks, cost, methods, against, pairs, classes = tables(nine)
    assert [row[:2] for row in first.rows] == [["teacher", "1"], ["kd", "4"], ["dkd", "3"], ["alone", "1"]]
    assert first.rows[1][2] == f"{100 * nine.groups[0].measures['top1'].mean:.2f}"
    assert first.rows[0][3] == "-"
    assert (of_networks.place, len(of_networks.rows)) == ("folded", 7)
    assert [row[0] for row in cost.rows] == ["teacher", "kd", "dkd", "alone"]
    assert methods.rows[0][0] == "kd - dkd"
    assert [row[0] for row in against.rows] == ["alone"]
    assert (pairs.place, len(pairs.rows)) == ("folded", 36)
    assert len(classes.head) == 6
    pooled = sum(nine.metrics[name].per_class[0].count for name in NAMES[1:5])
    assert float(classes.rows[0][3]) == pytest.approx(
        25 * pooled / nine.metrics["kd/version_0"].per_class[0].total, abs=0.01
    )
    _, shown, *_, against, pairs, _ = tables(nine, members=True)
    assert shown.place == "terminal"
    assert [row[0] for row in against.rows] == NAMES[1:]


def test_differences_from_the_reference(nine) -> None:
    against = tables(nine)[4]
    gap = nine.metrics["alone"].top1.value - nine.metrics["teacher"].top1.value
    assert against.rows[0][1] == f"{100 * gap:+.2f}"
    one = next(pair for pair in nine.differences if (pair.first, pair.second) == ("teacher", "alone"))
    assert against.rows[0][3:5] == [str(one.only_second), str(one.only_first)]
    low, high = one.interval  # of the opposite difference
    assert against.rows[0][2] == f"[{-100 * high:+.2f}, {-100 * low:+.2f}]"


@pytest.mark.parametrize("members", [False, True])
def test_tables_fit_80_columns(nine, members: bool) -> None:
    for table in tables(nine, members):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(*table.rich(80), sep="\n")
        text = console.export_text().replace("\N{NO-BREAK SPACE}", " ")
        assert max(map(len, text.splitlines())) <= 80
        for row in table.rows:
            assert all(f" {cell} " in text for cell in row)


def test_sixteen_networks_have_different_markers() -> None:
    assert len({style(number) for number in range(64)}) == 64


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        (["kd/version_0", "kd/version_12"], "kd"),
        (["kd10", "kd11"], "kd"),
        (["T4_seed0", "T4_seed1"], "T4"),
        (["kd_T4_a", "kd_T4_b"], "kd_T4"),
        (["x", "y"], "x (x to y)"),
    ],
)
def test_group_name_is_the_common_part(members: list[str], wanted: str) -> None:
    assert _group_name(members, set(members)) == wanted


def test_methods_are_grouped_by_their_settings() -> None:
    runs = {}
    for name, seed, own, weight, checkpoint in (
        ("a/0", 0, None, 0.5, "best"),
        ("a/1", 1, None, 0.5, "best-v1"),
        ("a/2", 1, 7, 0.5, "best"),  # another seed of the data
        ("a/3", 2, None, 0.5, "last"),
        ("a/4", 3, None, 0.9, "best"),
    ):
        folder = Path(name)
        folder.mkdir(parents=True)
        data = f"\ndata: {{class_path: X, init_args: {{seed: {own if own is not None else 'null'}}}}}"
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{weight: {weight}}}{data}")
        runs[name] = SimpleNamespace(path=folder / "checkpoints" / f"{checkpoint}.ckpt")
    assert methods_of(runs) == dict.fromkeys(("a/0", "a/1", "a/2"), "a")  # type: ignore[arg-type]


def test_p_values_are_corrected_for_many_pairs() -> None:
    assert [verdict(0.02, pairs) for pairs in (1, 2, 3)] == ["yes", "yes", "no"]
    assert verdict(math.nan, 1) == "-"
