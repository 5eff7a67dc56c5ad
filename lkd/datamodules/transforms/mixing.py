"""Mixing of training images: Mixup and CutMix with random numbers per image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lkd.datamodules.draws import MIX, uniform
from lkd.datamodules.transforms.erasing import inside_boxes
from lkd.types import Batch, Mixed

_CELLS = 2**14


def smaller_share(alpha: float, draw: Tensor) -> Tensor:
    r"""Return the smaller part, $\min(\lambda, 1 - \lambda)$, where $\lambda$ is distributed as Beta(alpha, alpha).

    The quantile function of this distribution is evaluated: the density is integrated once with the trapezoidal rule,
    after a substitution that removes the singularity, and inverted by linear interpolation. The probability below a
    returned value equals `draw` to within 1e-6 for alpha from 0.02 to 1000, and to within 1e-7 from 0.05 to 100.

    Args:
        alpha: Parameter of the Beta distribution, greater than 0.
        draw: Probabilities `(...)`, uniform in [0, 1).

    Returns:
        Shares `(...)`, float64, 0 to 0.5.

    Example:
        >>> smaller_share(1.0, torch.tensor([0.0, 0.5]))
        tensor([0.0000, 0.2500], dtype=torch.float64)
    """
    probability, point = _lower_half(alpha, draw.device)
    cell = torch.searchsorted(probability, draw.double(), right=True) - 1
    within = (draw - probability[cell]) / (probability[cell + 1] - probability[cell])
    found: Tensor = torch.lerp(point[cell], point[cell + 1], within) ** (1 / _power(alpha))
    return found


@lru_cache(maxsize=8)
def _lower_half(alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tabulate probabilities, 0 to 1, and smaller shares to a power at which their density begins smoothly."""
    if device.type != "cpu":
        probability, point = _lower_half(alpha, torch.device("cpu"))
        return probability.to(device), point.to(device)
    power = _power(alpha)
    point = torch.linspace(0.0, 0.5**power, _CELLS + 1, dtype=torch.float64)
    log_share = point.log() / power
    log_density = (alpha - power) * log_share + (alpha - 1) * (math.log(4) + torch.log1p(-log_share.exp()))
    below = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(log_density.exp())))
    return below / below[-1], point


def _power(alpha: float) -> float:
    return min(alpha / 2, 1.0)  # makes the probability grow quadratically with the points at 0, or more slowly


class MixPlan(NamedTuple):
    """Plan of which images of a batch are mixed, and with which partners.

    Attributes:
        chosen: Whether each image is mixed `(B,)`, bool.
        row: Positions in the batch that get a partner `(R,)`, int64: on the CPU the chosen ones, on other devices all.
        partner: Positions of the partners in the source `(R,)`, int64.
        share: Share of the partner `(R,)`, float64, 0 to 0.5.
        draws: Further random numbers `(R, 4)`, uniform in [0, 1).
    """

    chosen: Tensor
    row: Tensor
    partner: Tensor
    share: Tensor
    draws: Tensor


class Mix(ABC):
    r"""Base class of transforms that mix each training image with another one, its partner.

    The partner is any other training image, with its own augmentation of the same epoch. Whether an image is mixed, its
    partner and their shares are a pure function of (seed, epoch, index of the image), independent of the batch, so the
    teacher's logits of mixed images can be cached. With several views, each has its own random numbers.

    An image's own share is $\max(\lambda, 1 - \lambda)$, with $\lambda$ from Beta(alpha, alpha), so its own label has
    the larger weight. The supervised loss weights both labels by their shares (`Batch.mixed`); criteria and metrics
    that read `Batch.target` use only the image's own label.

    Attributes:
        alpha: Parameter of the Beta distribution, greater than 0. Smaller values reduce the partner's share.
        p: Probability that an image is mixed.
    """

    alpha: float
    p: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.alpha < math.inf:
            raise ValueError(
                f"{name}: alpha must be greater than 0, got {self.alpha}; to disable mixing, remove {name}"
            )
        if not 0 <= self.p <= 1:
            raise ValueError(f"{name}: the probability p must be between 0 and 1, got {self.p}")

    @abstractmethod
    def blend(self, image: Tensor, partner: Tensor, share: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images.

        Args:
            image: Images `(B, C, H, W)`, normalized.
            partner: Their partners `(B, C, H, W)`.
            share: Share of the partner `(B,)`, float64, 0 to 0.5.
            draws: Random numbers `(B, 4)`, uniform in [0, 1).

        Returns:
            Mixed images, and each image's own share `(B,)`, float32, 0.5 to 1.
        """

    def plan(self, seed: int, epoch: Tensor, index: Tensor, among: Tensor, stream: int) -> MixPlan:
        """Choose which images of a batch are mixed, and their partners.

        Args:
            seed: Seed of the augmentation.
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
            among: Positions in the source of all images that may be partners `(M,)`, int64.
            stream: First stream of random numbers of the view.
        """
        streams = stream + MIX + torch.arange(2, device=index.device)
        choice, place = uniform(seed, epoch, index, streams[:, None]).unbind(0)
        chosen = choice[:, 0] < self.p
        # Counting the images that are mixed would synchronize with a GPU: there, all are mixed, and `apply` selects.
        row = chosen.nonzero().squeeze(1) if index.is_cpu else torch.arange(len(index), device=index.device)
        share = smaller_share(self.alpha, choice[row, 2])
        return MixPlan(chosen, row, _another(among, index[row], choice[row, 1]), share, place[row])

    def apply(self, plan: MixPlan, batch: Batch, partner: Batch) -> Batch:
        """Mix the images of a batch.

        Args:
            plan: The plan of the batch.
            batch: The images `(B, C, H, W)`.
            partner: The partners that the plan names `(R, C, H, W)`; not read if there are none.

        Returns:
            The batch with mixed images and `Batch.mixed`.
        """
        mixed = Mixed.none(batch.target)
        if len(plan.row) == 0:
            return batch._replace(mixed=mixed)
        image, own = self.blend(batch.input[plan.row], partner.input, plan.share, plan.draws)
        if not plan.row.is_cpu:
            image = torch.where(plan.chosen.view(-1, 1, 1, 1), image, batch.input)
            partner = partner._replace(target=torch.where(plan.chosen, partner.target, mixed.target))
            own = torch.where(plan.chosen, own, mixed.weight)
        row = plan.row
        mixed = Mixed(mixed.target.index_copy(0, row, partner.target), mixed.weight.index_copy(0, row, own))
        return batch._replace(input=batch.input.index_copy(0, row, image), mixed=mixed)


def _another(among: Tensor, index: Tensor, draw: Tensor) -> Tensor:
    """Choose one of the other images with equal probability; the image itself if there is no other."""
    last = len(among) - 1
    chosen = among[(draw * last).long()]  # from all but the last, which replaces the image itself
    return torch.where(chosen == index, among[last], chosen)


@dataclass(frozen=True)
class Mixup(Mix):
    """Blend each training image with the pixels of another one. See `Mix`.

    Args:
        alpha: Parameter of the Beta distribution of the shares, greater than 0; smaller values reduce the partner's
            share.
        p: Probability that an image is mixed.

    Raises:
        ValueError: If `alpha` is not greater than 0, or the probability is not between 0 and 1.

    References:
        Zhang et al.: mixup: Beyond empirical risk minimization, ICLR 2018 (arXiv 1710.09412), section 2. In the paper,
        the partner is from the same batch, and the image's own share may be the smaller one. As each pair also occurs
        in reverse, the distribution is the same.
    """

    alpha: float = 1.0
    p: float = 1.0

    def blend(self, image: Tensor, partner: Tensor, share: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum; the draws are not used."""
        own = (1 - share).float()
        weight = own.view(-1, 1, 1, 1)
        return image * weight + partner * (1 - weight), own


@dataclass(frozen=True)
class CutMix(Mix):
    """Replace a box in each training image with that of another one, at the same position. See `Mix`.

    The box covers at most the partner's share. Its center is a random pixel, and the part outside the image is cut off;
    the image's own share is exactly the fraction that remains.

    Args:
        alpha: Parameter of the Beta distribution of the shares, greater than 0; smaller values reduce the partner's
            share.
        p: Probability that an image is mixed.

    Raises:
        ValueError: If `alpha` is not greater than 0, or the probability is not between 0 and 1.

    References:
        Yun et al.: CutMix: Regularization strategy to train strong classifiers with localizable features, ICCV 2019
        (arXiv 1905.04899), equations 1 and 2. In the paper, the box may cover more than half of the image, so the
        partner's label may have the larger weight. In the authors' code, an odd side is one pixel shorter, and the
        partner is from the same batch.
    """

    alpha: float = 1.0
    p: float = 1.0

    def blend(self, image: Tensor, partner: Tensor, share: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the box; the first two draws choose its center."""
        sides = [(share.sqrt() * size).long() for size in image.shape[2:]]
        edges = [(draws[:, i] * image.shape[2 + i]).long() - sides[i] // 2 for i in (0, 1)]
        inside = inside_boxes(image, *edges, *sides)
        return torch.where(inside, partner, image), (~inside).double().mean((1, 2, 3)).float()
