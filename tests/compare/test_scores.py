"""Comparison of segmentation networks by the counts of each image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from lkd import ClassificationModule, SyntheticDataModule, SyntheticSegmentationDataModule
from lkd.compare import Candidate, compare, write
from lkd.compare.command import _task_of
from lkd.compare.comparison import ScoreComparison
from lkd.compare.scores import bootstrapped, interval, score_difference, score_metrics
from lkd.loading import Trained
from lkd.models import UNet
from lkd.tasks import Classification, SemanticSegmentation
from lkd.types import IGNORE_INDEX

TASK = SemanticSegmentation(5)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {name: UNet((3, 4), num_classes=5).eval() for name in ("teacher", "student", "other")}


@pytest.fixture(scope="module")
def found(networks):
    data = SyntheticSegmentationDataModule(16, train_size=8, test_size=20, batch_size=8)
    candidates = [Candidate(*each) for each in networks.items()]
    return compare(candidates, data, "teacher", seconds=0.01, accelerator="cpu", task=TASK)


def _predictions(networks, data):
    """Return the predicted classes of all test images by network, and the labels."""
    batches = list(data.test_dataloader())
    with torch.no_grad():
        classes = {name: torch.cat([one(b.input).argmax(1) for b in batches]) for name, one in networks.items()}
    return classes, torch.cat([batch.target for batch in batches])


class Scores(nn.Linear):
    """A classifier with an output that only its task reads."""

    def forward(self, input):
        return {"scores": super().forward(input.flatten(1))}


class ScoresTask(Classification):
    """Task that reads the output of `Scores`."""

    def logits(self, output):
        return output["scores"]


class Cached(SemanticSegmentation):
    """A task that is not classification, although its outputs may be cached."""

    caches_logits = True


def test_the_task_determines_the_comparison(networks) -> None:
    data = SyntheticDataModule(3, (3, 4, 4), train_size=8, test_size=12, batch_size=4)
    candidate = Candidate("one", Scores(48, 3))
    result = compare([candidate], data, seconds=0.01, accelerator="cpu", task=ScoresTask())
    with torch.no_grad():
        logits = torch.cat([candidate.network(batch.input)["scores"] for batch in data.test_dataloader()])
    torch.testing.assert_close(result.predictions.logits["one"], logits)
    data = SyntheticSegmentationDataModule(16, train_size=8, test_size=8, batch_size=8)
    result = compare(
        [Candidate(*each) for each in networks.items()], data, seconds=0.01, accelerator="cpu", task=Cached(5)
    )
    assert isinstance(result, ScoreComparison)


def test_scores_equal_torchmetrics(found, networks) -> None:
    classes, target = _predictions(networks, found.data)
    settings = {"num_classes": 5, "ignore_index": IGNORE_INDEX}
    for name, own in classes.items():
        metrics = found.metrics[name]
        expected = multiclass_jaccard_index(own, target, average="macro", **settings)
        assert metrics.main.value == pytest.approx(float(expected), rel=1e-6)
        accuracy = multiclass_accuracy(own, target, average="micro", **settings)
        assert metrics.scores["pixel accuracy"].value == pytest.approx(float(accuracy), rel=1e-6)
        per_class = multiclass_jaccard_index(own, target, average="none", **settings)
        assert [one.value for one in metrics.per_class] == pytest.approx(per_class.tolist(), rel=1e-6)
    same = (classes["student"] == classes["teacher"])[target != IGNORE_INDEX].double().mean()
    assert found.metrics["student"].to_teacher["pixel accuracy"] == pytest.approx(float(same))
    assert not found.metrics["teacher"].to_teacher


def test_interval_is_a_bootstrap_over_images(found, networks) -> None:
    """The bootstrap resamples images and computes the mean IoU of each sample."""
    classes, target = _predictions(networks, found.data)
    random, drawn = np.random.default_rng(1), []
    for _ in range(400):
        rows = random.integers(len(target), size=len(target))
        drawn.append(float(TASK.scores(TASK.tally(classes["student"][rows], target[rows]).sum(0))["mean IoU"]))
    low, high = found.metrics["student"].main.interval
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.15 * (high - low))


def test_differences_are_paired(found, networks) -> None:
    assert {(one.first, one.second) for one in found.differences} == {
        ("teacher", "student"),
        ("teacher", "other"),
        ("student", "other"),
    }
    classes, target = _predictions(networks, found.data)
    samples = [bootstrapped(TASK, TASK.tally(classes[name], target)) for name in ("teacher", "student")]
    first, second = (one.scores["mean IoU"] for one in samples)
    one = found.differences[0]
    assert one.interval == pytest.approx(interval(first - second))
    assert one.value == pytest.approx(found.metrics["teacher"].main.value - found.metrics["student"].main.value)
    again = bootstrapped(TASK, TASK.tally(classes["teacher"], target))
    torch.testing.assert_close(again.per_class, samples[0].per_class, rtol=0, atol=0, equal_nan=True)


def test_differences_without_labels_are_undefined(found, networks) -> None:
    counts = torch.zeros(4, 3, 5, dtype=torch.int64)
    samples = {name: bootstrapped(TASK, counts) for name in "ab"}
    metrics = {name: score_metrics(TASK, counts, samples[name], None) for name in "ab"}
    undefined = score_difference("a", "b", metrics, samples)
    assert np.isnan([undefined.value, *undefined.interval, undefined.p_value]).all()


def test_shown_images_have_the_smallest_overlap(found, networks) -> None:
    classes, target = _predictions(networks, found.data)
    labelled = classes["teacher"].masked_fill(target == IGNORE_INDEX, IGNORE_INDEX)
    overlap = TASK.scores(TASK.tally(classes["student"], labelled))["mean IoU"]
    wanted = [f"no. {one}" for one in overlap.argsort(stable=True)[:12].tolist()]
    assert [row["image"].text for row in found.disagreements["student"]] == wanted


def test_report(found, tmp_path) -> None:
    write(found, tmp_path)
    text = (tmp_path / "comparison.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "IoU per class, %" in text
    written = json.loads((tmp_path / "comparison.json").read_text())["networks"]["student"]["metrics"]
    assert written["scores"]["mean IoU"]["value"] == found.metrics["student"].main.value
    assert (tmp_path / "comparison.md").read_text().startswith("# teacher, student, other\n")


@pytest.mark.parametrize("members", [False, True])
def test_seeds_of_a_method_share_a_row(members: bool, found, networks) -> None:
    """Means over the seeds; the individual networks are shown only on request."""
    candidates = [Candidate(name, one, group=None if name == "teacher" else "kd") for name, one in networks.items()]
    seeds = compare(candidates, found.data, "teacher", seconds=0.01, accelerator="cpu", task=TASK)
    tables = seeds.tables(members)
    values = [100 * found.metrics[name].main.value for name in ("student", "other")]
    assert [row[:4] for row in tables[0].rows] == [
        ["teacher", "1", f"{100 * found.metrics['teacher'].main.value:.2f}", "-"],
        ["kd", "2", f"{np.mean(values):.2f}", f"{np.std(values, ddof=1):.2f}"],
    ]
    shown = {table.title: [row[0] for row in table.rows] for table in tables if table.place == "terminal"}
    hidden = {table.title: [row[0] for row in table.rows] for table in tables if table.place == "folded"}
    pairs = ["student - teacher", "other - teacher", "student - other"]
    individual = {"Individual networks of each method": ["student", "other"]}
    if members:
        assert individual.items() <= shown.items()
        assert shown["Differences of trained networks"] == pairs
        (table,) = [table for table in tables if table.title == "Differences of trained networks"]
        assert table.rows[0][1] == f"{values[0] - 100 * found.metrics['teacher'].main.value:+.2f}"
        assert not hidden
    else:
        assert hidden == individual | {"All 3 pairs of trained networks": pairs}
        assert "Differences of trained networks" not in shown
    classes = tables[-1]
    assert classes.head == ["class", "teacher", "kd"]
    iou = [100 * found.metrics[name].per_class[1].value for name in ("student", "other")]
    assert classes.rows[1][2] == f"{np.mean(iou):.2f}"


def test_runs_of_several_tasks_are_rejected() -> None:
    tasks = {"a": SemanticSegmentation(5), "b": Classification()}
    runs = {
        name: Trained(None, {}, None, ClassificationModule(UNet((2, 2), 5), task=task), None)
        for name, task in tasks.items()
    }

    class Given:
        task = None

    with pytest.raises(ValueError, match=r"b was trained for Classification, but .* compared as SemanticSegmentation"):
        _task_of(Given, runs)
    assert _task_of(Given, {}).caches_logits
