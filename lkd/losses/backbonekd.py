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
    r"""Weighted sum of cosine distance and smooth L1 loss between features.

    $$ w_c \, \mathrm{mean} (1 - \cos(s, t)) + w_l \, \mathrm{mean} \, \mathrm{smooth}_{L1}(s - t) $$

    The cosine similarity is computed over the channels of each sample or pixel.

    Args:
        student_feature: Student feature `(B, D)` or `(B, D, H, W)`.
        teacher_feature: Teacher feature `(B, D)` or `(B, D, H, W)` with the same shape.
        cosine_weight: Weight of the cosine distance.
        smooth_l1_weight: Weight of the smooth L1 loss, which is quadratic for differences below 1 and linear above.

    Returns:
        Scalar loss (float32 for half-precision inputs).

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
    r"""Match pooled and patch features of a backbone.

    $$ w_p \, \mathrm{mean} (1 - \cos(a(s), t)) + w_m \big( w_c \, \mathrm{mean} (1 - \cos(b(S), T))
       + w_l \, \mathrm{mean} \, \mathrm{smooth}_{L1}(b(S) - T) \big) $$

    The linear projections a and b are trained with the student. Labels are not required: with `hard_weight` 0, the
    student's classifier is not trained, and fine-tuning follows. The teacher needs no classifier: its output `(B, D)`
    may be the pooled feature, as for timm models with `num_classes: 0`. Patch features are maps `(B, C, H, W)` or
    tokens `(B, N, C)` of a square grid, in either network. The finer grid is average-pooled to the coarser one. The
    terms are logged as `train/backbonekd_pooled` and `train/backbonekd_patches`.

    Args:
        student_pooled_layer: Student layer that returns the pooled feature `(B, C)`.
        teacher_pooled_layer: Teacher layer that returns the pooled feature; `None` uses the teacher's output.
        student_patch_layer: Student layer that returns the patch features.
        teacher_patch_layer: Teacher layer that returns the patch features.
        pooled_weight: Weight of the pooled features; 0 disables them.
        patch_weight: Weight of the patch features; 0 disables them.
        cosine_weight: Weight of the cosine distance within the patch term.
        smooth_l1_weight: Weight of the smooth L1 loss within the patch term.
        student_prefix_tokens: Number of leading student tokens that are not patches (class tokens, registers).
        teacher_prefix_tokens: Number of leading teacher tokens that are not patches.

    Raises:
        ValueError: If a weight is negative or both terms are disabled. At the start of training, if a layer's output
            does not have one of the expected shapes.

    References:
        Ranzinger et al.: AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024 (arXiv 2312.06709), for one
        teacher: cosine distance for pooled features, 0.9 cosine + 0.1 smooth L1 for patches. The projections are linear
        as in LightlyTrain, whereas the paper uses two layers. Grids are average-pooled, not interpolated.
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
            raise ValueError("pooled_weight and patch_weight are both 0; set at least one of them")
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
        """Create the projections."""
        features = self._features(student.outputs, teacher.outputs)
        if "pooled" in features:
            student_feature, teacher_feature = features["pooled"]
            if student_feature.ndim != 2 or teacher_feature.ndim != 2:
                raise ValueError(
                    f"BackboneKD requires pooled features (B, C), got {tuple(student_feature.shape)} from the student "
                    f"and {tuple(teacher_feature.shape)} from the teacher; set student_pooled_layer and "
                    "teacher_pooled_layer (or null for a teacher without a classifier)"
                )
            self.pooled_projection = nn.Linear(student_feature.shape[1], teacher_feature.shape[1])
        if "patches" in features:
            student_feature, teacher_feature = features["patches"]
            check_dims("BackboneKD", 4, student_patch=student_feature, teacher_patch=teacher_feature)
            self.patch_projection = nn.Conv2d(student_feature.shape[1], teacher_feature.shape[1], 1)

    def _features(self, student: Outputs, teacher: Outputs) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pairs of compared features by name, patch features as maps."""
        student_features = read_layers(student, self.student_layers)
        teacher_features = [teacher.logits] * self._reads_output + [
            teacher.features[layer] for layer in self.teacher_layers
        ]
        features = dict(zip(self._compared, zip(student_features, teacher_features, strict=True), strict=True))
        if "patches" in features:
            student_feature, teacher_feature = features["patches"]
            features["patches"] = (
                _map("student", student_feature, self.student_prefix_tokens),
                _map("teacher", teacher_feature, self.teacher_prefix_tokens),
            )
        return features

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted `feature_matching_loss` of pooled and patch features."""
        terms = {}
        features = self._features(student, teacher)
        if "pooled" in features:
            student_feature, teacher_feature = features["pooled"]
            loss = feature_matching_loss(self.pooled_projection(student_feature), teacher_feature, 1.0, 0.0)
            terms["pooled"] = self.pooled_weight * loss
        if "patches" in features:
            student_feature, teacher_feature = same_size(*features["patches"])
            loss = feature_matching_loss(
                self.patch_projection(student_feature), teacher_feature, self.cosine_weight, self.smooth_l1_weight
            )
            terms["patches"] = self.patch_weight * loss
        return terms


def _map(role: str, feature: Tensor, num_prefix_tokens: int) -> Tensor:
    return tokens_to_map("BackboneKD", role, feature, num_prefix_tokens) if feature.ndim == 3 else feature
