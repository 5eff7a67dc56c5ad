"""Contrastive representation distillation (CRD)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lkd.losses._adapters import embedding
from lkd.losses._checks import check_positive, check_temperature
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss
from lkd.types import IGNORE_INDEX, Batch, Outputs, Probe

_LARGE = 2**30  # bytes
_NEVER = torch.iinfo(torch.int64).max


@check_shapes(log_ratio="B M", num_samples="")
@full_precision
def crd_loss(log_ratio: Tensor, num_samples: int | Tensor, eps: float = 1e-7) -> Tensor:
    r"""Noise-contrastive estimation: tell a sample's counterpart from images drawn at random.

    $$ -\frac{1}{B} \sum_i \left( \log \frac{r_{i0}}{r_{i0} + c + \epsilon}
       + \sum_{k=1}^{K} \log \frac{c}{r_{ik} + c + \epsilon} \right), \quad c = K / N $$

    It is one of the two halves of `CRD`: for the student's embeddings among the teacher's, and the other way round.

    Args:
        log_ratio: log r, `(B, M)` with M = 1 + K: the counterpart's first, then those of K images drawn. r is the
            exponential of a similarity over temperature and normalisation, so that it is 1 on average over the data
            set.
        num_samples: N, the number of images that are drawn from; a tensor has the shape `()`.
        eps: Added to the denominators.

    Returns:
        A scalar in nats; float32 in half precision, else the type of `log_ratio`.

    References:
        Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020 (arXiv 1910.10699), and the
        authors' code.

    Example:
        >>> ratio = torch.tensor([[2.0, 1.0, 0.5]])
        >>> expected = math.log(2.4 / 2) + math.log(1.4 / 0.4) + math.log(0.9 / 0.4)
        >>> math.isclose(crd_loss(ratio.log(), num_samples=5).item(), expected, rel_tol=1e-5)
        True
    """
    noise = log_ratio.new_full((), log_ratio.shape[1] - 1) / num_samples
    total = torch.logaddexp(log_ratio, (noise + eps).log())
    own, drawn = total[:, 0] - log_ratio[:, 0], total[:, 1:] - noise.log()
    return (own + drawn.sum(1)).mean()


@full_precision
def _similarity(anchor: Tensor, memory: Tensor, position: Tensor, temperature: float) -> Tensor:
    """Products `(B, K)` of embeddings with rows of a memory, over temperature."""
    # Of all rows, then chosen: K rows for each sample would be B * K * D numbers, 0.5 GB for the paper's settings.
    # The memory is copied, as it changes before the gradient is taken.
    return (anchor @ memory.clone().mT).gather(1, position) / temperature


def _gathered(tensor: Tensor) -> Tensor:
    """`(B, ...)` of all processes, one behind the other, without gradient."""
    tensor = tensor.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class CRD(DistillLoss):
    r"""Contrastive representation distillation: the student's embedding of an image is to be known by the teacher's.

    Linear maps of both features, of length 1, are compared with memories of the other network's embeddings: that of
    the same image against `num_negatives` drawn at random (`crd_loss`, both ways, added). The normalisation is
    estimated in the first step and kept. After each step the images' rows become
    `momentum * old + (1 - momentum) * new`, of length 1; of several views or copies, their mean.

    The memories hold 2 * num_samples * feat_dim numbers on each device, and are saved in each checkpoint. With several
    processes all make the same update, from the embeddings of all. Only training images are drawn, where the data
    module says which these are (`train_index`): rows of others, held out for validation, say, are never written.

    Args:
        student_layer: Layer of the student whose feature it reads.
        teacher_layer: The teacher's.
        num_samples: How many images `Batch.index` counts; None: as the data module says.
        feat_dim: Length of the embeddings.
        num_negatives: How many images each sample is compared with.
        temperature: Greater than 0.
        momentum: Share of the old row in the memories, from 0 to 1.
        own_class: Whether images of a sample's own class may be drawn. If not, as in the published results, those are
            left out whose label has been seen: none in the first steps, all after an epoch.
        eps: Added to the denominators, greater than 0.

    Raises:
        ValueError: If a setting is out of range, or, in training, the number of images is not known or an image's
            position lies beyond it (noticed on the CPU; a GPU stops with an assertion).

    References:
        Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020 (arXiv 1910.10699), who weigh it with
        0.8. Their memory of a step in which an image occurs twice is that of one of the two.
    """

    needs_index = True
    reads_logits = False
    compares_samples = True
    per_process = "draws its negatives, from common memories"
    same_everywhere: ClassVar[tuple[str, ...]] = ("student_memory", "teacher_memory", "targets", "is_drawn", "log_z")
    train_index: Tensor | None = None
    """Positions of the training images `(N,)`, from the data module; None: all may be drawn."""
    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor
    targets: Tensor
    is_drawn: Tensor

    def __init__(
        self,
        student_layer: str = "@pooled",
        teacher_layer: str = "@pooled",
        num_samples: int | None = None,
        feat_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        own_class: bool = False,
        eps: float = 1e-7,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        for name, number in (("feat_dim", feat_dim), ("num_negatives", num_negatives), ("num_samples", num_samples)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}; the paper takes 0.5")
        check_positive("1e-7 is usual", eps=eps)
        self.num_samples = num_samples
        self.feat_dim = feat_dim
        self.num_negatives = num_negatives
        self.temperature = check_temperature(temperature)
        self.momentum = momentum
        self.own_class = own_class
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the embeddings and the memories."""
        if self.num_samples is None:
            raise ValueError(
                "CRD remembers every training image, and the data does not tell how many there are; give num_samples"
            )
        size = 2 * 4 * self.num_samples * self.feat_dim
        if size > _LARGE:
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn(
                f"CRD keeps two memories of {self.num_samples} x {self.feat_dim} numbers, {size / 2**30:.1f} GiB on "
                "each device and in each checkpoint, and copies them in each step; a smaller feat_dim needs less"
            )
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs)
        self.student_embedding = embedding(ours, self.feat_dim)
        self.teacher_embedding = embedding(theirs, self.feat_dim)
        start = torch.Generator().manual_seed(0)  # not the run's seed, which processes need not share
        for name in ("student_memory", "teacher_memory"):  # rows of a length of about 1, as in the authors' code
            uniform = 2 * torch.rand(self.num_samples, self.feat_dim, generator=start, device="cpu") - 1
            self.register_buffer(name, uniform.mul_(math.sqrt(3 / self.feat_dim)))
        self.register_buffer("log_z", torch.full((2,), -math.inf))  # not known yet
        self.register_buffer("targets", torch.full((self.num_samples,), IGNORE_INDEX))
        self.register_buffer("is_drawn", torch.full((self.num_samples,), self.train_index is None))
        if self.train_index is not None:
            self.is_drawn[self.train_index] = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `crd_loss` for the student's and for the teacher's embeddings; in training, it remembers them."""
        ((ours, theirs),) = self.pairs(student, teacher)
        if batch.index is None:
            raise ValueError("CRD needs to know which images it sees; give the batch an index")
        try:
            self.targets.gather(0, batch.index)
        except RuntimeError as error:
            raise ValueError(
                f"CRD remembers {len(self.targets)} images (num_samples), and a batch has one at another position "
                f"({error}): let num_samples be the number of images in the data set, validation images included"
            ) from error
        return self._compare(self.student_embedding(ours), self.teacher_embedding(theirs), batch.index, batch.target)

    @full_precision
    def _compare(self, ours: Tensor, theirs: Tensor, index: Tensor, target: Tensor) -> Tensor:
        ours, theirs = unit_vectors(ours, dim=1), unit_vectors(theirs, dim=1)
        position = torch.cat([index.unsqueeze(1), self.draw(index, target)], dim=1)
        scores = torch.stack(
            [
                _similarity(ours, self.teacher_memory, position, self.temperature),
                _similarity(theirs, self.student_memory, position, self.temperature),
            ]
        )
        log_ratio = scores - self._normalization(scores.detach()).view(2, 1, 1)
        if self.training:
            self._remember(*map(_gathered, (ours, theirs, index, target)))
        own, other = (crd_loss(ratio, self.is_drawn.sum(), self.eps) for ratio in log_ratio)
        return own + other

    def draw(self, index: Tensor, target: Tensor) -> Tensor:
        """Draw the images that each sample is compared with; override it to draw them otherwise.

        Args:
            index: Positions of the samples in the data set `(B,)`.
            target: Their classes `(B,)`.

        Returns:
            Positions `(B, num_negatives)`.
        """
        total, size = self.is_drawn.sum(), (len(index), self.num_negatives)
        # Class by class, and last what is not drawn: a sample's own class is one stretch of it, which is left out.
        ranked, order = self.targets.masked_fill(~self.is_drawn, _NEVER).sort(stable=True)
        first = torch.searchsorted(ranked, target.unsqueeze(1))
        count = torch.searchsorted(ranked, target.unsqueeze(1), right=True) - first
        count = count.masked_fill((target.unsqueeze(1) == IGNORE_INDEX) | self.own_class, 0)
        drawn = torch.randint(2**62, size, device=index.device) % (total - count).clamp(min=1)
        return order[torch.minimum(drawn + count * (drawn >= first), total - 1)]

    def _normalization(self, scores: Tensor) -> Tensor:
        """The logarithm of the mean exponential of the scores `(2, B, 1 + K)` in the first step, times N."""
        share = scores.new_full((), scores[0].numel()) / self.is_drawn.sum()
        estimate = scores.flatten(1).logsumexp(1) - share.log()
        if self.training:
            every = _gathered(estimate.unsqueeze(0))
            estimate = every.logsumexp(0) - math.log(len(every))
        log_z = torch.where(self.log_z.isneginf(), estimate, wide(self.log_z))
        if self.training:
            self.log_z.copy_(log_z)
        return log_z

    def _remember(self, ours: Tensor, theirs: Tensor, index: Tensor, target: Tensor) -> None:
        # An image that occurs twice has one row: which of two writes is the last, a GPU does not say.
        same = index.unsqueeze(1) == index
        share = same.to(ours.dtype) / same.sum(1, keepdim=True)
        for memory, new in ((self.student_memory, ours), (self.teacher_memory, theirs)):
            mean = share @ new
            row = unit_vectors(self.momentum * wide(memory[index]) + (1 - self.momentum) * mean, dim=1)
            memory.index_copy_(0, index, row.to(memory.dtype))
        label = torch.where(same, target, IGNORE_INDEX).amax(1)  # of an image's views, only one may have it
        self.targets.index_copy_(0, index, torch.where(label == IGNORE_INDEX, self.targets[index], label))
