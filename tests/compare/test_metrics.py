"""Metrics equal those of scikit-learn, torchmetrics, and independent computations of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import binom, entropy
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from torchmetrics.classification import MulticlassCalibrationError

from lkd.compare.metrics import (
    FOLDS,
    Share,
    confusion,
    cross_fitted,
    difference,
    fitted_temperature,
    measure,
    reliability,
)
from lkd.types import IGNORE_INDEX

CLASSES = 7


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randint(CLASSES, (400,), generator=torch.Generator().manual_seed(1))


def random_logits(target: torch.Tensor, seed: int, scale: float = 3.0) -> torch.Tensor:
    """Return logits with an accuracy of about two thirds, and a confidence given by `scale`."""
    noise = torch.randn(len(target), CLASSES, generator=torch.Generator().manual_seed(seed))
    return scale * (noise + 1.5 * torch.nn.functional.one_hot(target, CLASSES))


def test_metrics_equal_scikit_learn_and_torchmetrics(target) -> None:
    logits, teacher = random_logits(target, 2), random_logits(target, 3)
    found = measure(logits, target, teacher)
    probabilities, chosen = softmax(logits.double().numpy(), 1), logits.argmax(1).numpy()
    labels = list(range(CLASSES))
    assert found.top1.value == accuracy_score(target, chosen)
    assert found.top5.value == top_k_accuracy_score(target, probabilities, k=5, labels=labels)
    assert found.nll == pytest.approx(log_loss(target, probabilities, labels=labels), abs=1e-9)
    metric = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    assert found.ece == pytest.approx(float(metric(logits.double().softmax(1), target)), abs=1e-6)  # float32
    assert found.agreement.value == accuracy_score(teacher.argmax(1), chosen)
    assert found.kl == pytest.approx(entropy(softmax(teacher.double().numpy(), 1), probabilities, axis=1).mean())
    assert [share.value for share in found.per_class] == pytest.approx(recall_score(target, chosen, average=None))
    assert [share.total for share in found.per_class] == np.bincount(target).tolist()
    wanted = confusion_matrix(target, chosen, normalize="true")
    assert confusion(logits, target).numpy() == pytest.approx(wanted)


def test_unlabelled_images_count_only_for_agreement(target) -> None:
    logits, teacher = random_logits(target, 2), random_logits(target, 3)
    partly = target.clone()
    partly[::4] = IGNORE_INDEX
    known = partly != IGNORE_INDEX
    found, alone = measure(logits, partly, teacher), measure(logits[known], target[known])
    assert (found.top1, found.nll, found.ece) == (alone.top1, alone.nll, alone.ece)
    assert found.agreement.total == 400
    with pytest.raises(ValueError, match="none of the images has a label"):
        measure(logits, torch.full_like(target, IGNORE_INDEX))


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (8103, 10_000)])
def test_intervals_are_wilson_intervals(count: int, total: int) -> None:
    z, share = 1.959963984540054, count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert Share(count, total).interval == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_temperature_has_the_lowest_loss(target) -> None:
    logits = random_logits(target, 2).double()
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 4001))
    losses = [-log_softmax(logits.numpy() / t, 1)[np.arange(400), target].mean() for t in grid]
    assert fitted_temperature(logits, target) == pytest.approx(grid[int(np.argmin(losses))], rel=3e-3)
    assert fitted_temperature(7 * logits, target) == pytest.approx(7 * fitted_temperature(logits, target), rel=1e-3)


def test_temperature_is_cross_fitted(target) -> None:
    logits = random_logits(target, 2).double()
    scaled = cross_fitted(logits, target)
    part = torch.randperm(400, generator=torch.Generator().manual_seed(0)) % FOLDS
    for number in range(FOLDS):
        own = part == number
        wanted = logits[own] / fitted_temperature(logits[~own], target[~own])
        assert torch.equal(scaled[own], wanted)
    found = measure(logits, target)
    assert found.scaled_nll < found.nll
    assert found.scaled_ece < found.ece


def test_temperature_of_perfect_predictions() -> None:
    logits = 5 * torch.eye(3).repeat(4, 1)
    found = measure(logits, torch.arange(12) % 3)
    assert 0.05 <= found.temperature < 1
    assert found.scaled_nll == pytest.approx(0, abs=1e-9)
    assert found.top5 is None


def test_mcnemar(target) -> None:
    ours, theirs = random_logits(target, 2), random_logits(target, 3, scale=1.0)
    found = difference("a", "b", ours, theirs, target)
    right, other = ours.argmax(1) == target, theirs.argmax(1) == target
    gained, lost = int((right & ~other).sum()), int((~right & other).sum())
    assert (found.only_first, found.only_second, found.total) == (gained, lost, 400)
    # the exact test: twice the smaller tail of a binomial distribution with p = 0.5
    assert found.p_value == pytest.approx(min(1, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5)))
    assert found.value == pytest.approx(float(right.double().mean() - other.double().mean()))


def test_interval_is_a_bootstrap_over_images(target) -> None:
    ours, theirs = random_logits(target, 2), random_logits(target, 3)
    found = difference("a", "b", ours, theirs, target)
    gap = ((ours.argmax(1) == target).double() - (theirs.argmax(1) == target).double()).numpy()
    drawn = np.random.default_rng(5).choice(gap, (10_000, 400)).mean(1)
    # both are random: their quantiles differ by about a hundredth of the interval
    assert found.interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.004)


def test_equal_networks_do_not_differ(target) -> None:
    logits = random_logits(target, 2)
    found = difference("a", "b", logits, logits, target)
    assert (found.value, found.interval, found.p_value) == (0, (0, 0), 1)


def test_reliability_sums_to_the_calibration_error(target) -> None:
    logits = random_logits(target, 2).double()
    bins = reliability(logits, target)
    assert sum(one.share for one in bins) == pytest.approx(1)
    gap = sum(one.share * abs(one.accuracy - one.confidence) for one in bins if one.share)
    assert gap == pytest.approx(measure(logits, target).ece, abs=1e-12)


def test_calibration_error_with_confidence_1() -> None:
    """Predictions with confidence 1 share the last bin with those above 14/15, whose accuracy is higher."""
    logits, target = torch.zeros(100, CLASSES), torch.zeros(100, dtype=torch.int64)
    logits[:50, 0] = math.log(0.95 * (CLASSES - 1) / 0.05)  # confidence 0.95, all correct
    logits[50:, 0] = 100.0  # confidence 1, of which 80 % are correct
    target[90:] = 1
    found = measure(logits, target)
    assert found.ece == pytest.approx(abs(0.9 - 0.975), abs=1e-6)
    assert [one.share for one in found.reliability] == [0.0] * 14 + [1.0]
