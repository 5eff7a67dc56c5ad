"""Self-supervised knowledge distillation (SSKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._divergence import softened_kl
from lkd.losses._labels import own_class
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss
from lkd.losses.kd import kd_loss
from lkd.types import IGNORE_INDEX, Batch, Outputs, Probe

_VIEWS = 4


def _upright(views: Tensor) -> Tensor:
    """The first view of each image `(B, ...)`."""
    return views.chunk(_VIEWS)[0]


def _turned(views: Tensor) -> Tensor:
    """The other views, image by image `(3 * B, ...)`."""
    return torch.stack(views.chunk(_VIEWS)[1:], dim=1).flatten(0, 1)


def _similarity(embedding: Tensor) -> Tensor:
    """Cosines of each turned view with each image `(3 * B, B)`."""
    return unit_vectors(_turned(embedding), dim=1) @ unit_vectors(_upright(embedding), dim=1).T


def _own_image(similarity: Tensor) -> Tensor:
    """To which image each turned view belongs `(3 * B,)`."""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat_interleave(_VIEWS - 1)


def _kept_mean(values: Tensor, score: Tensor, answer: Tensor, ratio: float) -> Tensor:
    """Mean of `(N,)` over the rows where the teacher's score `(N, M)` is largest at the answer, and the best others.

    Of the others, ordered by how many columns score more than the answer, and then as they come, a share is kept. Rows
    whose answer is not known (`IGNORE_INDEX`) do not count.
    """
    known = answer != IGNORE_INDEX
    rank = (score > score.gather(1, own_class(answer, score))).sum(1).masked_fill(~known, score.shape[1])
    right = (rank == 0).sum()
    kept = right + ((known.sum() - right).to(score.dtype) * ratio).long()
    place = rank.argsort(stable=True).argsort()  # rows are masked, not chosen: shapes stay, and so does a compiled step
    return values.masked_fill(place >= kept, 0).sum() / kept.clamp(min=1)


@check_shapes(student_embedding="4B D", teacher_embedding="4B E")
@full_precision
def sskd_ss_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, temperature: float = 0.5, ratio: float = 0.75
) -> Tensor:
    r"""Divergence of the similarities between turned images and images: `SSKD`'s self-supervised part.

    $$ \frac{\tau^2}{|S|} \sum_{i \in S} \mathrm{KL}(\mathrm{softmax}(a_{t,i} / \tau) \,\|\,
       \mathrm{softmax}(a_{s,i} / \tau)), \quad a_{ij} = \cos(e_i, e_j) $$

    i are turned views, j images as they are. S are the views that the teacher assigns to their own image, and a share
    of the others: those with the fewest images more similar than their own.

    Args:
        student_embedding: `(4 * B, D)`, all images as they are, then all turned once, ...
        teacher_embedding: `(4 * B, E)`.
        temperature: Greater than 0.
        ratio: Share of the wrongly assigned views that counts, 0 to 1.

    Returns:
        A scalar in nats; float32 for features in half precision, else the features' type.

    References:
        Xu et al.: Knowledge Distillation Meets Self-Supervision, ECCV 2020 (arXiv 2006.07114). Of views with equally
        many images more similar, the authors keep any; here, those of the first images.
    """
    student, teacher = _similarity(student_embedding), _similarity(teacher_embedding)
    values = temperature**2 * softened_kl(student, teacher, temperature)
    return _kept_mean(values, teacher, _own_image(teacher), ratio)


@check_shapes(student_logits="4B K", teacher_logits="4B K", target="B")
@full_precision
def sskd_tf_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0, ratio: float = 1.0
) -> Tensor:
    r"""Hinton's loss on the turned images that the teacher classifies best: `SSKD`'s part on transformed images.

    $$ \frac{\tau^2}{|S|} \sum_{i \in S} \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\,
       \mathrm{softmax}(z_{s,i} / \tau)) $$

    S are the turned views of which the teacher finds the class, and a share of the others: those with the fewest
    classes more likely than the right one.

    Args:
        student_logits: `(4 * B, K)`, all images as they are, then all turned once, ...
        teacher_logits: `(4 * B, K)`.
        target: The classes `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.
        ratio: Share of the wrongly classified views that counts, 0 to 1.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Xu et al.: Knowledge Distillation Meets Self-Supervision, ECCV 2020 (arXiv 2006.07114).
    """
    student, teacher = _turned(student_logits), _turned(teacher_logits)
    values = temperature**2 * softened_kl(student, teacher, temperature)
    return _kept_mean(values, teacher, target.repeat_interleave(_VIEWS - 1), ratio)


@full_precision
def _assignment_loss(embedding: Tensor) -> Tensor:
    """Cross-entropy of finding each turned view's own image by its cosines."""
    similarity = _similarity(embedding)
    return F.cross_entropy(similarity, _own_image(similarity))


def _head(feature: Tensor) -> nn.Sequential:
    """A projection head of two layers.

    The second has no bias, so that the cosines of what it says do not depend on the weights' size: weight decay, which
    goes on when the head's training ends, then changes nothing.
    """
    width = feature.shape[1]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False))


class SSKD(DistillLoss):
    """Knowledge distillation with self-supervision: what the teacher says of turned images is knowledge as well.

    It reads four views of each image: as it is, and turned (`lkd.datamodules.RotatedViews`). Projection heads on the
    pooled features, trained with the student, tell by cosines to which image a turned view belongs; the student
    imitates the teacher's similarities (`sskd_ss_loss`), its classes of turned images (`sskd_tf_loss`) and of the
    images as they are (`kd_loss`). The teacher's head learns to find each view's own image, by cross-entropy; the
    teacher itself stays as it is. The curves are `train/sskd_kd`, `train/sskd_ss`, `train/sskd_tf` and
    `train/sskd_teacher_head`.

    The authors train the teacher's head first. In one run, `lkd.callbacks.Schedule` does it with the shape `step`:
    `criterion.ss_weight` is 0 in the first epochs, and `criterion.teacher_head_weight` afterwards.

    Args:
        student_layer: Layer of the student with its pooled feature `(B, C)`.
        teacher_layer: The teacher's.
        kd_weight: Weight of the comparison on the images as they are.
        ss_weight: Weight of the similarities.
        tf_weight: Weight of the comparison on turned images.
        teacher_head_weight: Weight of the teacher's head's own loss, which does not reach the student.
        kd_temperature: Temperature of the comparison on the images as they are.
        ss_temperature: Temperature of the similarities.
        tf_temperature: Temperature of the comparison on turned images.
        ss_ratio: Share of the views that the teacher assigns wrongly that counts.
        tf_ratio: Share of the turned images that the teacher classifies wrongly that counts.

    Raises:
        ValueError: If a weight is negative, a temperature not greater than 0, a ratio not between 0 and 1, or, in
            training, a layer's feature has another form.

    References:
        Xu et al.: Knowledge Distillation Meets Self-Supervision, ECCV 2020 (arXiv 2006.07114). Their heads have a bias
        in the second layer too, and the teacher's is trained for 60 epochs before the student's first.
    """

    num_views = _VIEWS
    compares_samples = True
    per_process = "assigns views to its images, and chooses among them"
    skips_unlabelled = None

    def __init__(
        self,
        student_layer: str = "@pooled",
        teacher_layer: str = "@pooled",
        kd_weight: float = 0.9,
        ss_weight: float = 10.0,
        tf_weight: float = 2.7,
        teacher_head_weight: float = 1.0,
        kd_temperature: float = 4.0,
        ss_temperature: float = 0.5,
        tf_temperature: float = 4.0,
        ss_ratio: float = 0.75,
        tf_ratio: float = 1.0,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        check_weights(
            kd_weight=kd_weight, ss_weight=ss_weight, tf_weight=tf_weight, teacher_head_weight=teacher_head_weight
        )
        for name, ratio in (("ss_ratio", ss_ratio), ("tf_ratio", tf_ratio)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {ratio}; 1 keeps all views")
        self.kd_weight = kd_weight
        self.ss_weight = ss_weight
        self.tf_weight = tf_weight
        self.teacher_head_weight = teacher_head_weight
        self.kd_temperature = check_temperature(kd_temperature, "kd_temperature")
        self.ss_temperature = check_temperature(ss_temperature, "ss_temperature")
        self.tf_temperature = check_temperature(tf_temperature, "tf_temperature")
        self.ss_ratio = ss_ratio
        self.tf_ratio = tf_ratio

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projection heads."""
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs, dims=2)
        self.student_head = _head(ours)
        self.teacher_head = _head(theirs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The three parts of the student's loss, and that of the teacher's head."""
        ((ours, theirs),) = self.pairs(student, teacher)
        own, other = self.student_head(ours), self.teacher_head(theirs.detach())
        target = _upright(batch.target)  # the turned ones have none
        kd = kd_loss(_upright(student.logits), _upright(teacher.logits), self.kd_temperature)
        ss = sskd_ss_loss(own, other.detach(), self.ss_temperature, self.ss_ratio)
        tf = sskd_tf_loss(student.logits, teacher.logits, target, self.tf_temperature, self.tf_ratio)
        return {
            "kd": self.kd_weight * kd,
            "ss": self.ss_weight * ss,
            "tf": self.tf_weight * tf,
            "teacher_head": self.teacher_head_weight * _assignment_loss(other),
        }
