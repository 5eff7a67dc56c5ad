"""Feature distillation from a self-supervised or foundation backbone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import same_size
from lkd.losses._checks import check_dims, check_weights
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._tokens import tokens_to_map
from lkd.losses.base import DistillLoss, read_layers
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature=("B D", "B D H W"), teacher_feature=("B D", "B D H W"))
@full_precision
def feature_matching_loss(
    student_feature: Tensor, teacher_feature: Tensor, cosine_weight: float = 0.9, smooth_l1_weight: float = 0.1
) -> Tensor:
    r"""Difference of features in direction, and in value.

    $$ w_c \, \mathrm{mean} (1 - \cos(s, t)) + w_l \, \mathrm{mean} \, \mathrm{smooth}_{L1}(s - t) $$

    The cosine is that of the channels, of each sample or pixel.

    Args:
        student_feature: `(B, D)` or `(B, D, H, W)`.
        teacher_feature: `(B, D)` or `(B, D, H, W)`, the same shape.
        cosine_weight: Weight of the first part.
        smooth_l1_weight: Weight of the second part: the square, halved, up to 1, beyond it the absolute value - 1/2.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Ranzinger et al.: AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024 (arXiv 2312.06709).

    Example:
        >>> import torch
        >>> feature_matching_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
        0.949999988079071
    """
    direction = 1 - F.cosine_similarity(student_feature, teacher_feature, dim=1).mean()
    return cosine_weight * direction + smooth_l1_weight * F.smooth_l1_loss(student_feature, teacher_feature)


class BackboneKD(DistillLoss):
    r"""A self-supervised or foundation backbone is imitated: its pooled feature, and its features of patches.

    $$ w_p \, \mathrm{mean} (1 - \cos(a(s), t)) + w_m \big( w_c \, \mathrm{mean} (1 - \cos(b(S), T))
       + w_l \, \mathrm{mean} \, \mathrm{smooth}_{L1}(b(S) - T) \big) $$

    a and b are linear projections that train with the student. It needs no labels: with `hard_weight` 0 the student's
    classifier learns nothing, and fine-tuning follows. The teacher needs no classifier; what it returns,
    `(B, D)`, may be its pooled feature: timm's networks do so with `num_classes: 0`. Features of patches are maps
    `(B, C, H, W)` or tokens `(B, N, C)` of a square grid, in either network; the finer grid is averaged to the coarser
    one's size. Its curves are `train/backbonekd_pooled` and `train/backbonekd_patches`.

    Args:
        student_pooled_layer: Layer of the student that returns its pooled feature `(B, C)`.
        teacher_pooled_layer: The teacher's; None: what the teacher itself returns.
        student_patch_layer: Layer of the student that returns its features of patches.
        teacher_patch_layer: The teacher's.
        pooled_weight: Weight of the pooled features; 0: they are not read.
        patch_weight: Weight of the features of patches; 0: they are not read.
        cosine_weight: Among the patches, weight of the difference in direction.
        smooth_l1_weight: Among the patches, weight of the difference in value.
        student_prefix_tokens: How many of the student's tokens, at the beginning, are of no patch (class tokens,
            registers).
        teacher_prefix_tokens: How many of the teacher's.

    Raises:
        ValueError: If a weight is negative, there is nothing to read, or, in training, a layer returns another form.

    References:
        Ranzinger et al.: AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024 (arXiv 2312.06709), for one
        teacher: the cosine for the pooled feature, 0.9 cosine + 0.1 smooth L1 for the patches. The projections are
        linear, as in LightlyTrain, where the paper has two layers; grids are averaged, not interpolated.
    """

    reads_logits = False

    def __init__(
        self,
        student_pooled_layer: str = "@pooled",
        teacher_pooled_layer: str | None = "@pooled",
        student_patch_layer: str = "@last_stage",
        teacher_patch_layer: str = "@last_stage",
        pooled_weight: float = 1.0,
        patch_weight: float = 1.0,
        cosine_weight: float = 0.9,
        smooth_l1_weight: float = 0.1,
        student_prefix_tokens: int = 1,
        teacher_prefix_tokens: int = 1,
    ) -> None:
        check_weights(pooled_weight=pooled_weight, patch_weight=patch_weight)
        check_weights(cosine_weight=cosine_weight, smooth_l1_weight=smooth_l1_weight)
        if pooled_weight == patch_weight == 0:
            raise ValueError("pooled_weight and patch_weight are both 0, so there is nothing to imitate; set one")
        pooled, patches = bool(pooled_weight), bool(patch_weight)
        super().__init__(
            [student_pooled_layer] * pooled + [student_patch_layer] * patches,
            ([] if teacher_pooled_layer is None else [teacher_pooled_layer]) * pooled + [teacher_patch_layer] * patches,
        )
        self._reads_output = pooled and teacher_pooled_layer is None
        self._compared = ("pooled",) * pooled + ("patches",) * patches
        self.pooled_weight = pooled_weight
        self.patch_weight = patch_weight
        self.cosine_weight = cosine_weight
        self.smooth_l1_weight = smooth_l1_weight
        self.student_prefix_tokens = student_prefix_tokens
        self.teacher_prefix_tokens = teacher_prefix_tokens

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projections."""
        features = self._features(student.outputs, teacher.outputs)
        if "pooled" in features:
            ours, theirs = features["pooled"]
            if ours.ndim != 2 or theirs.ndim != 2:
                raise ValueError(
                    f"BackboneKD reads pooled features (B, C); the student's is {tuple(ours.shape)}, the teacher's "
                    f"{tuple(theirs.shape)}: name other layers (student_pooled_layer, teacher_pooled_layer; null for a "
                    "teacher without a classifier)"
                )
            self.pooled_projection = nn.Linear(ours.shape[1], theirs.shape[1])
        if "patches" in features:
            ours, theirs = features["patches"]
            check_dims("BackboneKD", 4, student_patch=ours, teacher_patch=theirs)
            self.patch_projection = nn.Conv2d(ours.shape[1], theirs.shape[1], 1)

    def _features(self, student: Outputs, teacher: Outputs) -> dict[str, tuple[Tensor, Tensor]]:
        """What is compared, by name; patches as maps."""
        ours = read_layers(student, self.student_layers)
        theirs = [teacher.logits] * self._reads_output + [teacher.features[layer] for layer in self.teacher_layers]
        features = dict(zip(self._compared, zip(ours, theirs, strict=True), strict=True))
        if "patches" in features:
            own, other = features["patches"]
            features["patches"] = (
                _map("student", own, self.student_prefix_tokens),
                _map("teacher", other, self.teacher_prefix_tokens),
            )
        return features

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted `feature_matching_loss` of pooled features and of patches."""
        terms = {}
        features = self._features(student, teacher)
        if "pooled" in features:
            ours, theirs = features["pooled"]
            loss = feature_matching_loss(self.pooled_projection(ours), theirs, 1.0, 0.0)
            terms["pooled"] = self.pooled_weight * loss
        if "patches" in features:
            ours, theirs = same_size(*features["patches"])
            loss = feature_matching_loss(self.patch_projection(ours), theirs, self.cosine_weight, self.smooth_l1_weight)
            terms["patches"] = self.patch_weight * loss
        return terms


def _map(role: str, feature: Tensor, num_prefix_tokens: int) -> Tensor:
    return tokens_to_map("BackboneKD", role, feature, num_prefix_tokens) if feature.ndim == 3 else feature
