"""What logits and labels say of a classifier: pure functions, and the figures made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torchmetrics.functional.classification import multiclass_calibration_error

from lkd.types import IGNORE_INDEX

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""
FOLDS = 5
"""Parts of the images that get their temperature from the others."""


@dataclass(frozen=True)
class Share:
    """How many of how many, and the interval that holds the true share with a probability of 95 %.

    Attributes:
        count: How many.
        total: Of how many.
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]; NaN of nothing."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval, 95 % (Wilson 1927): it stays within [0, 1], and holds near its ends, too."""
        if not self.total:
            return math.nan, math.nan
        found = binomtest(self.count, self.total).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence.

    Attributes:
        share: Of all answers.
        accuracy: How many of them are right; NaN of none.
        confidence: The mean probability of the chosen class; NaN of none.
    """

    share: float
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class Figures:
    """What was measured of one network's answers.

    Attributes:
        top1: Images whose largest logit is the label's.
        top5: Images whose label is among the five largest logits; None with five classes or fewer.
        nll: Mean negative log-likelihood of the labels, in nats.
        ece: Expected calibration error over 15 bins of equal width, in [0, 1].
        temperature: The temperature whose softened probabilities have the least `nll`.
        scaled_nll: `nll` after temperature scaling: each fifth of the images with the temperature that fits the others.
        scaled_ece: `ece` after the same.
        agreement: Images for which the teacher has the same largest logit; None without a teacher.
        kl: Mean of KL(teacher || network), at temperature 1, in nats; None without a teacher.
        per_class: `top1` of each class's images.
        reliability: The 15 bins of `ece`.
        scaled_reliability: Those of `scaled_ece`.
    """

    top1: Share
    top5: Share | None
    nll: float
    ece: float
    temperature: float
    scaled_nll: float
    scaled_ece: float
    agreement: Share | None
    kl: float | None
    per_class: list[Share]
    reliability: list[Bin]
    scaled_reliability: list[Bin]


@dataclass(frozen=True)
class Difference:
    """Whether one network is more accurate than another, on the same images.

    Attributes:
        first: The one network.
        second: The other.
        only_first: Images that the first alone has right.
        only_second: Images that the second alone has right.
        total: Images.
        interval: 95 % interval of the difference, from 10,000 paired bootstrap samples.
        p_value: McNemar's exact test: how likely at least so uneven counts are, were both equally good.
    """

    first: str
    second: str
    only_first: int
    only_second: int
    total: int
    interval: tuple[float, float]
    p_value: float

    @property
    def value(self) -> float:
        """The first's accuracy minus the second's, in [-1, 1]."""
        return (self.only_first - self.only_second) / self.total


def measure(logits: Tensor, target: Tensor, teacher: Tensor | None = None) -> Figures:
    """Measure one network's answers.

    Args:
        logits: `(N, K)`, in any order of the images.
        target: Their classes `(N,)`; `IGNORE_INDEX` where there is no label: these count for the teacher alone.
        teacher: The teacher's logits `(N, K)`.

    Returns:
        The figures.

    Raises:
        ValueError: If no image has a label.
    """
    known = target != IGNORE_INDEX
    if not known.any():
        raise ValueError("none of the images has a label, so no accuracy can be measured; take a labelled split")
    answers, labels = logits[known].double(), target[known]
    right = answers.argmax(1) == labels
    scaled = cross_fitted(answers, labels)
    classes = answers.shape[1]
    per_class = [Share(int(right[labels == one].sum()), int((labels == one).sum())) for one in range(classes)]
    return Figures(
        top1=_share(right),
        top5=_share((answers.topk(5).indices == labels[:, None]).any(1)) if classes > 5 else None,
        nll=float(cross_entropy(answers, labels)),
        ece=calibration_error(answers, labels),
        temperature=fitted_temperature(answers, labels),
        scaled_nll=float(cross_entropy(scaled, labels)),
        scaled_ece=calibration_error(scaled, labels),
        agreement=None if teacher is None else _share(logits.argmax(1) == teacher.argmax(1)),
        kl=None if teacher is None else float(divergences(logits, teacher).mean()),
        per_class=per_class,
        reliability=reliability(answers, labels),
        scaled_reliability=reliability(scaled, labels),
    )


def _share(hits: Tensor) -> Share:
    return Share(int(hits.sum()), len(hits))


def divergences(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || network) of each image, at temperature 1.

    Args:
        logits: `(N, K)`.
        teacher: `(N, K)`.

    Returns:
        `(N,)`, in nats.
    """
    ours, theirs = (answers.double().log_softmax(1) for answers in (logits, teacher))
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def calibration_error(logits: Tensor, target: Tensor) -> float:
    """Expected calibration error: by how much confidence differs from accuracy.

    Args:
        logits: `(N, K)`.
        target: `(N,)`.

    Returns:
        The mean over 15 bins of equal width, weighted by their images, in [0, 1].

    References:
        Guo et al.: On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), equation 3.
    """
    probabilities = logits.softmax(1)
    return float(multiclass_calibration_error(probabilities, target, logits.shape[1], n_bins=BINS, norm="l1"))


def fitted_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature that makes the labels likeliest (temperature scaling).

    Args:
        logits: `(N, K)`.
        target: `(N,)`.

    Returns:
        A number between 0.05 and 20; above 1 where the network is too sure.

    References:
        Guo et al.: On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), section 4.2.
    """
    logits = logits.float()  # twice as fast, and the minimum is flat

    def nll(exponent: float) -> float:
        return float(cross_entropy(logits / math.exp(exponent), target))

    # Where every label has the largest logit, the least temperature would be 0.
    found = minimize_scalar(nll, bounds=(-math.log(20), math.log(20)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def cross_fitted(logits: Tensor, target: Tensor) -> Tensor:
    """Logits after temperature scaling, each fifth of the images with the temperature that the others ask for.

    No other images are needed, and none is measured with a temperature that it has helped to find.

    Args:
        logits: `(N, K)`.
        target: `(N,)`.

    Returns:
        `(N, K)`.
    """
    scaled = logits.clone()
    # by chance, always the same: images may lie class by class, or class after class in turn
    fold = torch.randperm(len(target), generator=torch.Generator().manual_seed(0)) % FOLDS
    for number in range(min(FOLDS, len(target)) if len(target) > 1 else 0):
        own = fold == number
        scaled[own] = logits[own] / fitted_temperature(logits[~own], target[~own])
    return scaled


def difference(first: str, second: str, ours: Tensor, theirs: Tensor, target: Tensor, seed: int = 0) -> Difference:
    """Compare two networks on the same images.

    Args:
        first: The one network's name.
        second: The other's.
        ours: The first's logits `(N, K)`.
        theirs: The second's logits `(N, K)`.
        target: `(N,)`; images without a label (`IGNORE_INDEX`) do not count.
        seed: Seed of the bootstrap.

    Returns:
        The difference with its interval, and McNemar's exact test.

    References:
        McNemar: Note on the sampling error of the difference between correlated proportions, 1947.
    """
    known = target != IGNORE_INDEX
    right, other = ((answers.argmax(1) == target)[known] for answers in (ours, theirs))
    gained, lost, total = int((right & ~other).sum()), int((other & ~right).sum()), int(known.sum())
    # A sample of images, drawn with replacement, tells of the difference by these two counts alone.
    shares = [gained / total, lost / total, 1 - (gained + lost) / total]
    drawn = np.random.default_rng(seed).multinomial(total, shares, size=10_000)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / total, [0.025, 0.975])
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(first, second, gained, lost, total, (float(low), float(high)), float(p_value))


def reliability(logits: Tensor, target: Tensor) -> list[Bin]:
    """Accuracy and confidence, bin by bin.

    Args:
        logits: `(N, K)`.
        target: `(N,)`.

    Returns:
        The 15 bins of equal width, the least confident first.
    """
    confidence, chosen = logits.double().softmax(1).max(1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    counts = torch.bincount(place, minlength=BINS).double()
    right, sure = (
        torch.bincount(place, weights=what.double(), minlength=BINS) / counts for what in (chosen == target, confidence)
    )
    return [Bin(*values) for values in zip((counts / len(target)).tolist(), right.tolist(), sure.tolist(), strict=True)]


def confusion(logits: Tensor, target: Tensor) -> Tensor:
    """How the images of each class are classified.

    Args:
        logits: `(N, K)`.
        target: `(N,)`.

    Returns:
        `(K, K)`: the share of the images of class (row) that are taken for class (column).
    """
    classes = logits.shape[1]
    counts = torch.bincount(target * classes + logits.argmax(1), minlength=classes**2).view(classes, classes).double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)
