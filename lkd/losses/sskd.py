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


def _unrotated(views: Tensor) -> Tensor:
    """Return the first, unrotated view of each image `(B, ...)`."""
    return views.chunk(_VIEWS)[0]


def _rotated(views: Tensor) -> Tensor:
    """Return the rotated views, grouped by image `(3 * B, ...)`."""
    return torch.stack(views.chunk(_VIEWS)[1:], dim=1).flatten(0, 1)


def _similarity(embedding: Tensor) -> Tensor:
    """Return the cosine similarities between rotated views and unrotated images `(3 * B, B)`."""
    return unit_vectors(_rotated(embedding), dim=1) @ unit_vectors(_unrotated(embedding), dim=1).T


def _own_image(similarity: Tensor) -> Tensor:
    """Return the index of the image that each rotated view belongs to `(3 * B,)`."""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat_interleave(_VIEWS - 1)


def _kept_mean(values: Tensor, score: Tensor, expected: Tensor, ratio: float) -> Tensor:
    """Average `values` `(N,)` over the rows that the teacher's `score` `(N, M)` ranks correctly, and some others.

    A row is correct if its score is largest in the expected column. The other rows are ordered by the number of columns
    that score higher than the expected one, ties in their original order, and the share `ratio` of them is kept. Rows
    whose expected column is `IGNORE_INDEX` are excluded.
    """
    known = expected != IGNORE_INDEX
    rank = (score > score.gather(1, own_class(expected, score))).sum(1).masked_fill(~known, score.shape[1])
    right = (rank == 0).sum()
    kept = right + ((known.sum() - right).to(score.dtype) * ratio).long()
    place = rank.argsort(stable=True).argsort()  # masked, so that shapes stay static
    return values.masked_fill(place >= kept, 0).sum() / kept.clamp(min=1)


@check_shapes(student_embedding="4B D", teacher_embedding="4B E")
@full_precision
def sskd_ss_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, temperature: float = 0.5, ratio: float = 0.75
) -> Tensor:
    r"""Divergence of the similarities between rotated and unrotated images: the self-supervised term of `SSKD`.

    $$ \frac{\tau^2}{|S|} \sum_{i \in S} \mathrm{KL}(\mathrm{softmax}(a_{t,i} / \tau) \,\|\,
       \mathrm{softmax}(a_{s,i} / \tau)), \quad a_{ij} = \cos(e_i, e_j) $$

    The index i runs over rotated views and j over unrotated images. S contains the views that the teacher assigns to
    the correct image, and a share of the others, in the order of how many images are more similar than the correct one.

    Args:
        student_embedding: Student embeddings `(4 * B, D)`: all unrotated images, then all images rotated once, and so
            on.
        teacher_embedding: Teacher embeddings `(4 * B, E)` in the same order.
        temperature: Softmax temperature, greater than 0.
        ratio: Share of the incorrectly assigned views in S, between 0 and 1.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Xu et al.: Knowledge Distillation Meets Self-Supervision, ECCV 2020 (arXiv 2006.07114). Among views with the
        same number of more similar images, the authors' code keeps arbitrary ones; here, those of the first images are
        kept.
    """
    student, teacher = _similarity(student_embedding), _similarity(teacher_embedding)
    values = temperature**2 * softened_kl(student, teacher, temperature)
    return _kept_mean(values, teacher, _own_image(teacher), ratio)


@check_shapes(student_logits="4B K", teacher_logits="4B K", target="B")
@full_precision
def sskd_tf_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0, ratio: float = 1.0
) -> Tensor:
    r"""Divergence between teacher and student on rotated images: the transformation term of `SSKD`.

    $$ \frac{\tau^2}{|S|} \sum_{i \in S} \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\,
       \mathrm{softmax}(z_{s,i} / \tau)) $$

    S contains the rotated views that the teacher classifies correctly, and a share of the others, in the order of how
    many classes are more likely than the correct one.

    Args:
        student_logits: Student logits `(4 * B, K)`: all unrotated images, then all images rotated once, and so on.
        teacher_logits: Teacher logits `(4 * B, K)` in the same order.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        temperature: Softmax temperature, greater than 0.
        ratio: Share of the incorrectly classified views in S, between 0 and 1.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Xu et al.: Knowledge Distillation Meets Self-Supervision, ECCV 2020 (arXiv 2006.07114).
    """
    student, teacher = _rotated(student_logits), _rotated(teacher_logits)
    values = temperature**2 * softened_kl(student, teacher, temperature)
    return _kept_mean(values, teacher, target.repeat_interleave(_VIEWS - 1), ratio)


@full_precision
def _assignment_loss(embedding: Tensor) -> Tensor:
    """Compute the cross-entropy of assigning each rotated view to its image by cosine similarity."""
    similarity = _similarity(embedding)
    return F.cross_entropy(similarity, _own_image(similarity))


def _head(feature: Tensor) -> nn.Sequential:
    """Create a projection head of two linear layers.

    The second layer has no bias, so the cosine similarities of the outputs do not depend on the scale of the weights.
    Weight decay, which continues after the training of the head has ended, then has no effect on them.
    """
    width = feature.shape[1]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False))


class SSKD(DistillLoss):
    """Self-supervised KD: KD plus rotated-view similarities.

    The criterion reads four views of each image: unrotated, and rotated three times (`lkd.datamodules.RotatedViews`).
    Projection heads on the pooled features, trained with the student, assign rotated views to images by cosine
    similarity. The student matches the teacher's similarities (`sskd_ss_loss`), its predictions for rotated images
    (`sskd_tf_loss`) and its predictions for unrotated images (`kd_loss`). The teacher's head is trained with a
    cross-entropy to find the image of each view; the teacher itself is unchanged. The terms are logged as
    `train/sskd_kd`, `train/sskd_ss`, `train/sskd_tf` and `train/sskd_teacher_head`.

    The authors train the teacher's head before the student. `lkd.callbacks.Schedule` with the shape `step` does this in
    a single run: set `criterion.ss_weight` to 0 in the first epochs and `criterion.teacher_head_weight` to 0
    afterwards.

    Args:
        student_layer: Student layer that returns the pooled feature `(B, C)`.
        teacher_layer: Teacher layer that returns the pooled feature.
        kd_weight: Weight of the divergence on unrotated images.
        ss_weight: Weight of the self-supervised term.
        tf_weight: Weight of the divergence on rotated images.
        teacher_head_weight: Weight of the loss of the teacher's head, which has no gradient with respect to the
            student.
        kd_temperature: Softmax temperature for unrotated images, greater than 0.
        ss_temperature: Softmax temperature of the similarities, greater than 0.
        tf_temperature: Softmax temperature for rotated images, greater than 0.
        ss_ratio: Share of views incorrectly assigned by the teacher that is kept, between 0 and 1.
        tf_ratio: Share of rotated images incorrectly classified by the teacher that is kept, between 0 and 1.

    Raises:
        ValueError: If a weight is negative, a temperature is not greater than 0, or a ratio is not between 0 and 1. At
            the start of training, if a layer does not return a pooled feature.

    References:
        Xu et al.: Knowledge Distillation Meets Self-Supervision, ECCV 2020 (arXiv 2006.07114). In the authors' code,
        the second layer of the heads also has a bias, and the teacher's head is trained for 60 epochs before the
        student.
    """

    num_views = _VIEWS
    compares_samples = True
    per_process = "assignment and selection of views"
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
        """Create the projection heads."""
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs, dims=2)
        self.student_head = _head(student_feature)
        self.teacher_head = _head(teacher_feature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the three terms of the student and the loss of the teacher's head."""
        ((student_feature, teacher_feature),) = self.pairs(student, teacher)
        student_embedding = self.student_head(student_feature)
        teacher_embedding = self.teacher_head(teacher_feature.detach())
        target = _unrotated(batch.target)  # rotated views have no labels
        kd = kd_loss(_unrotated(student.logits), _unrotated(teacher.logits), self.kd_temperature)
        ss = sskd_ss_loss(student_embedding, teacher_embedding.detach(), self.ss_temperature, self.ss_ratio)
        tf = sskd_tf_loss(student.logits, teacher.logits, target, self.tf_temperature, self.tf_ratio)
        return {
            "kd": self.kd_weight * kd,
            "ss": self.ss_weight * ss,
            "tf": self.tf_weight * tf,
            "teacher_head": self.teacher_head_weight * _assignment_loss(teacher_embedding),
        }
