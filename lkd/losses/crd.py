"""Contrastive representation distillation (CRD)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lkd.losses._adapters import embedding
from lkd.losses._checks import check_positive, check_temperature
from lkd.losses._memory import gathered
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
    r"""Noise-contrastive loss of a positive pair against randomly drawn negatives.

    $$ -\frac{1}{B} \sum_i \left( \log \frac{r_{i0}}{r_{i0} + c + \epsilon}
       + \sum_{k=1}^{K} \log \frac{c}{r_{ik} + c + \epsilon} \right), \quad c = K / N $$

    It is one of the two terms of `CRD`, with either the student's or the teacher's embeddings as anchors.

    Args:
        log_ratio: $\log r$ `(B, M)` with M = 1 + K: the positive first, then K negatives. The ratio r is the
            exponential of a similarity divided by temperature and normalization constant, so its mean over the dataset
            is 1.
        num_samples: Number N of images that negatives are drawn from; a tensor has the shape `()`.
        eps: Constant added to the denominators.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

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
    positive, negative = total[:, 0] - log_ratio[:, 0], total[:, 1:] - noise.log()
    return (positive + negative.sum(1)).mean()


@full_precision
def _similarity(anchor: Tensor, memory: Tensor, position: Tensor, temperature: float) -> Tensor:
    """Return the similarities `(B, K)` of embeddings with rows of a memory bank, divided by the temperature."""
    # Gathering K rows per sample would take B * K * D values, 0.5 GB for the paper's settings. The memory is cloned
    # because it is updated before the backward pass.
    return (anchor @ memory.clone().mT).gather(1, position) / temperature


class CRD(DistillLoss):
    """Contrastive representation distillation.

    Linear embeddings of both features, normalized to unit length, are compared with memory banks of the other network's
    embeddings: the entry of the same image is the positive, and `num_negatives` random entries are the negatives
    (`crd_loss`, in both directions, summed). The normalization constant is estimated in the first step and then fixed.
    After each step, the entries of the images become `momentum * old + (1 - momentum) * new`, normalized to unit
    length. If an image occurs several times in a batch, its embeddings are averaged.

    The memory banks hold 2 * num_samples * feat_dim values on each device and are saved in checkpoints. In distributed
    training, all processes apply the same update with the embeddings of all processes. If the data module provides the
    training indices (`train_index`), negatives are drawn from training images only: the entries of other images, such
    as held-out validation images, are never updated.

    Args:
        student_layer: Student layer whose feature is embedded.
        teacher_layer: Teacher layer whose feature is embedded.
        num_samples: Number of images that `Batch.index` refers to; `None` takes it from the data module.
        feat_dim: Size of the embeddings.
        num_negatives: Number of negatives for each sample.
        temperature: Temperature of the similarities, greater than 0.
        momentum: Weight of the old entry in the memory update, between 0 and 1.
        own_class: Whether images of the sample's own class may be negatives. If not, as in the published results, they
            are excluded once their labels have been seen, that is, completely after the first epoch.
        eps: Constant added to the denominators, greater than 0.

    Raises:
        ValueError: If a setting is out of range. At the start of training, if the number of images is unknown. In
            `forward`, if an index is out of range (on the CPU; on a GPU, a device-side assertion fails).

    References:
        Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020 (arXiv 1910.10699). The authors use
        the weight 0.8. If an image occurs twice in a step, their memory keeps one of the two embeddings.
    """

    needs_index = True
    reads_logits = False
    compares_samples = True
    per_process = "negatives sampled from the shared memory banks"
    same_everywhere: ClassVar[tuple[str, ...]] = ("student_memory", "teacher_memory", "targets", "is_drawn", "log_z")
    train_index: Tensor | None = None
    """Positions of the training images `(N,)`, from the data module; `None` if all images may be drawn."""
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
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}; the paper uses 0.5")
        check_positive("typically 1e-7", eps=eps)
        self.num_samples = num_samples
        self.feat_dim = feat_dim
        self.num_negatives = num_negatives
        self.temperature = check_temperature(temperature)
        self.momentum = momentum
        self.own_class = own_class
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the embeddings and the memory banks."""
        if self.num_samples is None:
            raise ValueError(
                "CRD stores every training image, but the data module does not provide their number; set num_samples"
            )
        size = 2 * 4 * self.num_samples * self.feat_dim
        if size > _LARGE:
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn(
                f"CRD keeps two memory banks of {self.num_samples} x {self.feat_dim} values, {size / 2**30:.1f} GiB on "
                "each device and in each checkpoint, and copies them in each step; reduce feat_dim to save memory"
            )
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs)
        self.student_embedding = embedding(student_feature, self.feat_dim)
        self.teacher_embedding = embedding(teacher_feature, self.feat_dim)
        start = torch.Generator().manual_seed(0)  # processes may have different seeds
        for name in ("student_memory", "teacher_memory"):  # norms of about 1, as in the authors' code
            uniform = 2 * torch.rand(self.num_samples, self.feat_dim, generator=start, device="cpu") - 1
            self.register_buffer(name, uniform.mul_(math.sqrt(3 / self.feat_dim)))
        self.register_buffer("log_z", torch.full((2,), -math.inf))  # estimated in the first step
        self.register_buffer("targets", torch.full((self.num_samples,), IGNORE_INDEX))
        self.register_buffer("is_drawn", torch.full((self.num_samples,), self.train_index is None))
        if self.train_index is not None:
            self.is_drawn[self.train_index] = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `crd_loss` in both directions and, in training, update the memory banks."""
        ((student_feature, teacher_feature),) = self.pairs(student, teacher)
        if batch.index is None:
            raise ValueError("CRD requires the dataset indices of the images; provide Batch.index")
        if batch.target.shape != batch.index.shape:
            raise ValueError(
                f"CRD requires one class per image, a target of shape {tuple(batch.index.shape)}, got "
                f"{tuple(batch.target.shape)}; for masks, use a segmentation criterion such as lkd.losses.CIRKD"
            )
        try:
            self.targets.gather(0, batch.index)
        except RuntimeError as error:
            raise ValueError(
                f"CRD stores {len(self.targets)} images (num_samples), but a batch contains another index "
                f"({error}); set num_samples to the number of images in the dataset, including validation images"
            ) from error
        student_embedding = self.student_embedding(student_feature)
        teacher_embedding = self.teacher_embedding(teacher_feature)
        return self._compare(student_embedding, teacher_embedding, batch.index, batch.target)

    @full_precision
    def _compare(self, student: Tensor, teacher: Tensor, index: Tensor, target: Tensor) -> Tensor:
        student, teacher = unit_vectors(student, dim=1), unit_vectors(teacher, dim=1)
        position = torch.cat([index.unsqueeze(1), self.draw(index, target)], dim=1)
        scores = torch.stack(
            [
                _similarity(student, self.teacher_memory, position, self.temperature),
                _similarity(teacher, self.student_memory, position, self.temperature),
            ]
        )
        log_ratio = scores - self._normalization(scores.detach()).view(2, 1, 1)
        if self.training:
            self._remember(*map(gathered, (student, teacher, index, target)))
        student_loss, teacher_loss = (crd_loss(ratio, self.is_drawn.sum(), self.eps) for ratio in log_ratio)
        return student_loss + teacher_loss

    def draw(self, index: Tensor, target: Tensor) -> Tensor:
        """Draw the negatives of each sample; override this method to change the sampling.

        Args:
            index: Dataset indices of the samples `(B,)`.
            target: Class indices of the samples `(B,)`.

        Returns:
            Dataset indices of the negatives `(B, num_negatives)`.
        """
        total, size = self.is_drawn.sum(), (len(index), self.num_negatives)
        # Sorted by class, excluded images last, so a sample's own class is one contiguous range, which is skipped.
        ranked, order = self.targets.masked_fill(~self.is_drawn, _NEVER).sort(stable=True)
        first = torch.searchsorted(ranked, target.unsqueeze(1))
        count = torch.searchsorted(ranked, target.unsqueeze(1), right=True) - first
        count = count.masked_fill((target.unsqueeze(1) == IGNORE_INDEX) | self.own_class, 0)
        drawn = torch.randint(2**62, size, device=index.device) % (total - count).clamp(min=1)
        return order[torch.minimum(drawn + count * (drawn >= first), total - 1)]

    def _normalization(self, scores: Tensor) -> Tensor:
        """Return the log normalization constants, estimated in the first step from the scores `(2, B, 1 + K)`."""
        share = scores.new_full((), scores[0].numel()) / self.is_drawn.sum()
        estimate = scores.flatten(1).logsumexp(1) - share.log()
        if self.training:
            every = gathered(estimate.unsqueeze(0))
            estimate = every.logsumexp(0) - math.log(len(every))
        log_z = torch.where(self.log_z.isneginf(), estimate, wide(self.log_z))
        if self.training:
            self.log_z.copy_(log_z)
        return log_z

    def _remember(self, student: Tensor, teacher: Tensor, index: Tensor, target: Tensor) -> None:
        # Duplicates of an image are averaged, since the order of writes to the same row is undefined on a GPU.
        same = index.unsqueeze(1) == index
        share = same.to(student.dtype) / same.sum(1, keepdim=True)
        for memory, new in ((self.student_memory, student), (self.teacher_memory, teacher)):
            mean = share @ new
            row = unit_vectors(self.momentum * wide(memory[index]) + (1 - self.momentum) * mean, dim=1)
            memory.index_copy_(0, index, row.to(memory.dtype))
        label = torch.where(same, target, IGNORE_INDEX).amax(1)  # only one of an image's views may have a label
        self.targets.index_copy_(0, index, torch.where(label == IGNORE_INDEX, self.targets[index], label))
