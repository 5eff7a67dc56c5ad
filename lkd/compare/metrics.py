"""Metrics of a classifier from its logits and the labels, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lkd.types import IGNORE_INDEX

BINS = 15
"""Number of bins of the calibration error, as in Guo et al. 2017."""
FOLDS = 5
"""Number of folds for temperature scaling: the temperature of each fold is fitted to the other folds."""


@dataclass(frozen=True)
class Share:
    """Proportion of images with a 95 % confidence interval.

    Attributes:
        count: Number of images with the property.
        total: Total number of images.
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """Proportion in [0, 1]; NaN without images."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval (Wilson 1927), which is within [0, 1] and also valid near 0 and 1."""
        if not self.total:
            return math.nan, math.nan
        found = binomtest(self.count, self.total).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Bin:
    """Bin of predictions with similar confidence.

    Attributes:
        share: Proportion of all predictions.
        accuracy: Proportion of correct predictions in the bin; NaN if it is empty.
        confidence: Mean probability of the predicted class; NaN if the bin is empty.
    """

    share: float
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class ClassificationMetrics:
    """Metrics of one network.

    Attributes:
        top1: Top-1 accuracy.
        top5: Top-5 accuracy; None with five classes or fewer.
        nll: Mean negative log-likelihood of the labels, in nats.
        ece: Expected calibration error over 15 bins of equal width, in [0, 1].
        temperature: Temperature that minimizes `nll`.
        scaled_nll: `nll` after temperature scaling, where the temperature of each fifth of the images is fitted to the
            other images.
        scaled_ece: `ece` after the same temperature scaling.
        agreement: Images for which network and teacher predict the same class; None without a teacher.
        kl: Mean of KL(teacher || network) at temperature 1, in nats; None without a teacher.
        per_class: Top-1 accuracy for the images of each class.
        reliability: The 15 bins of `ece`.
        scaled_reliability: The 15 bins of `scaled_ece`.
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

    @property
    def main(self) -> Share:
        """Main metric: the top-1 accuracy."""
        return self.top1

    def measures(self) -> dict[str, float]:
        """Return the scalar metrics by name, starting with the main metric; those not measured are omitted."""
        found = {
            "top1": self.top1.value,
            "top5": None if self.top5 is None else self.top5.value,
            "nll": self.nll,
            "ece": self.ece,
            "temperature": self.temperature,
            "scaled_nll": self.scaled_nll,
            "scaled_ece": self.scaled_ece,
            "agreement": None if self.agreement is None else self.agreement.value,
            "kl": self.kl,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Difference:
    """Difference in accuracy between two networks on the same images, with McNemar's exact test.

    Attributes:
        first: Name of the first network.
        second: Name of the second network.
        only_first: Number of images that only the first network classifies correctly.
        only_second: Number of images that only the second network classifies correctly.
        total: Number of images.
        interval: 95 % interval of the difference, from 10,000 paired bootstrap samples.
        p_value: Probability of counts that are at least as unequal if both networks were equally accurate.
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
        """Accuracy of the first network minus that of the second, in [-1, 1]."""
        return (self.only_first - self.only_second) / self.total


def measure(logits: Tensor, target: Tensor, teacher: Tensor | None = None) -> ClassificationMetrics:
    """Compute the metrics of a network from its logits.

    Args:
        logits: Logits `(N, K)`.
        target: Class indices `(N,)`. Unlabelled images (`IGNORE_INDEX`) count only in the comparison with the teacher.
        teacher: Teacher logits `(N, K)`.

    Returns:
        Metrics of the network.

    Raises:
        ValueError: If no image has a label.
    """
    known = target != IGNORE_INDEX
    if not known.any():
        raise ValueError("none of the images has a label, so the accuracy is undefined; use a labelled split")
    known_logits, labels = logits[known].double(), target[known]
    right = known_logits.argmax(1) == labels
    scaled = cross_fitted(known_logits, labels)
    classes = known_logits.shape[1]
    per_class = [Share(int(right[labels == one].sum()), int((labels == one).sum())) for one in range(classes)]
    return ClassificationMetrics(
        top1=_share(right),
        top5=_share((known_logits.topk(5).indices == labels[:, None]).any(1)) if classes > 5 else None,
        nll=float(cross_entropy(known_logits, labels)),
        ece=calibration_error(known_logits, labels),
        temperature=fitted_temperature(known_logits, labels),
        scaled_nll=float(cross_entropy(scaled, labels)),
        scaled_ece=calibration_error(scaled, labels),
        agreement=None if teacher is None else _share(logits.argmax(1) == teacher.argmax(1)),
        kl=None if teacher is None else float(divergences(logits, teacher).mean()),
        per_class=per_class,
        reliability=reliability(known_logits, labels),
        scaled_reliability=reliability(scaled, labels),
    )


def _share(hits: Tensor) -> Share:
    return Share(int(hits.sum()), len(hits))


def divergences(logits: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher || network) of each image at temperature 1.

    Args:
        logits: Logits of the network `(N, K)`.
        teacher: Teacher logits `(N, K)`.

    Returns:
        Divergences `(N,)`, in nats.
    """
    log_student, log_teacher = (scores.double().log_softmax(1) for scores in (logits, teacher))
    return kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def calibration_error(logits: Tensor, target: Tensor) -> float:
    """Compute the expected calibration error: the mean absolute difference between confidence and accuracy.

    Args:
        logits: Logits `(N, K)`.
        target: Class indices `(N,)`.

    Returns:
        Mean over 15 bins of equal width, weighted by their numbers of images, in [0, 1].

    References:
        Guo et al.: On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), equation 3.
    """
    # torchmetrics rounds to float32 and puts the confidence 1 in a bin of its own, which changes the error.
    return sum(one.share * abs(one.accuracy - one.confidence) for one in reliability(logits, target) if one.share)


def fitted_temperature(logits: Tensor, target: Tensor) -> float:
    """Fit the temperature that maximizes the likelihood of the labels (temperature scaling).

    Args:
        logits: Logits `(N, K)`.
        target: Class indices `(N,)`.

    Returns:
        Temperature between 0.05 and 20; above 1 if the network is overconfident.

    References:
        Guo et al.: On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), section 4.2.
    """
    logits = logits.float()  # twice as fast, and the minimum is flat

    def nll(exponent: float) -> float:
        return float(cross_entropy(logits / math.exp(exponent), target))

    # If every label has the largest logit, the optimum is 0, so the search is bounded.
    found = minimize_scalar(nll, bounds=(-math.log(20), math.log(20)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def cross_fitted(logits: Tensor, target: Tensor) -> Tensor:
    """Apply cross-fitted temperature scaling: the temperature of each fifth of the images is fitted to the others.

    No additional images are required, and no image contributes to its own temperature.

    Args:
        logits: Logits `(N, K)`.
        target: Class indices `(N,)`.

    Returns:
        Scaled logits `(N, K)`.
    """
    scaled = logits.clone()
    # random with a fixed seed, because the images may be sorted by class or cycle through the classes
    fold = torch.randperm(len(target), generator=torch.Generator().manual_seed(0)) % FOLDS
    for number in range(min(FOLDS, len(target)) if len(target) > 1 else 0):
        own = fold == number
        scaled[own] = logits[own] / fitted_temperature(logits[~own], target[~own])
    return scaled


def difference(
    first: str, second: str, first_logits: Tensor, second_logits: Tensor, target: Tensor, seed: int = 0
) -> Difference:
    """Compare the accuracy of two networks on the same images.

    Args:
        first: Name of the first network.
        second: Name of the second network.
        first_logits: Logits of the first network `(N, K)`.
        second_logits: Logits of the second network `(N, K)`.
        target: Class indices `(N,)`. Unlabelled images (`IGNORE_INDEX`) are ignored.
        seed: Seed of the bootstrap.

    Returns:
        Difference with its bootstrap interval and McNemar's exact test.

    References:
        McNemar: Note on the sampling error of the difference between correlated proportions, 1947.
    """
    known = target != IGNORE_INDEX
    first_hits, second_hits = ((logits.argmax(1) == target)[known] for logits in (first_logits, second_logits))
    gained, lost = int((first_hits & ~second_hits).sum()), int((second_hits & ~first_hits).sum())
    total = int(known.sum())
    # The difference in a bootstrap sample depends only on these two counts.
    shares = [gained / total, lost / total, 1 - (gained + lost) / total]
    drawn = np.random.default_rng(seed).multinomial(total, shares, size=10_000)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / total, [0.025, 0.975])
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(first, second, gained, lost, total, (float(low), float(high)), float(p_value))


def reliability(logits: Tensor, target: Tensor) -> list[Bin]:
    """Compute accuracy and confidence in bins of confidence.

    Args:
        logits: Logits `(N, K)`.
        target: Class indices `(N,)`.

    Returns:
        15 bins of equal width, in increasing order of confidence.
    """
    confidence, chosen = logits.double().softmax(1).max(1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    counts = torch.bincount(place, minlength=BINS).double()
    right, sure = (
        torch.bincount(place, weights=what.double(), minlength=BINS) / counts for what in (chosen == target, confidence)
    )
    return [Bin(*values) for values in zip((counts / len(target)).tolist(), right.tolist(), sure.tolist(), strict=True)]


def confusion(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the confusion matrix, normalized over the true classes.

    Args:
        logits: Logits `(N, K)`.
        target: Class indices `(N,)`.

    Returns:
        Matrix `(K, K)`: proportion of the images of a true class (row) that are predicted as a class (column).
    """
    classes = logits.shape[1]
    counts = torch.bincount(target * classes + logits.argmax(1), minlength=classes**2).view(classes, classes).double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)
