"""Cross-head knowledge distillation (CrossKD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lkd.features.layers import evaluating, resolve_layers
from lkd.losses._adapters import aligner, channel_pairs
from lkd.losses._boxes import box_divergence, check_boxes, rows
from lkd.losses._checks import check_temperature, check_weights, layer_list
from lkd.losses._dense import interpolated
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.losses.pkd import moments, standardized
from lkd.types import Batch, Outputs, Probe

_EPS = torch.finfo(torch.float32).eps
"""Constant that the authors' code adds to the divisors."""


@check_shapes(student_logits="N K", teacher_logits="N K", weight="N", avg_factor="")
@full_precision
def crosskd_class_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None = None,
    beta: float = 1.0,
    avg_factor: float | Tensor = 1.0,
) -> Tensor:
    r"""Binary cross-entropy with the teacher's probabilities, weighted by the distance of the probabilities.

    $$ \frac{1}{a + \epsilon} \sum_{i,k} w_i \, |\sigma(s_{ik}) - \sigma(t_{ik})|^\beta \,
       \mathrm{BCE}(s_{ik}, \sigma(t_{ik})) $$

    Args:
        student_logits: Class logits of the teacher's head for the student's feature `(N, K)`.
        teacher_logits: Class logits of the teacher `(N, K)`.
        weight: Weight of each position `(N,)`; `None` for 1.
        beta: Exponent of the distance, at least 1.
        avg_factor: Divisor a of the sum, a number or a tensor `()`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Wang et al.: CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024 (arXiv 2306.11369).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> crosskd_class_loss(logits, logits).item()
        0.0
    """
    wanted = teacher_logits.sigmoid()
    distance = (student_logits.sigmoid() - wanted).abs() ** beta
    loss = (distance * F.binary_cross_entropy_with_logits(student_logits, wanted, reduction="none")).sum(1)
    return (loss if weight is None else weight * loss).sum() / (avg_factor + _EPS)


@check_shapes(student_boxes="N 4M", teacher_boxes="N 4M", quality="N")
@full_precision
def crosskd_box_loss(student_boxes: Tensor, teacher_boxes: Tensor, quality: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Mean divergence between the distributions over the positions of a box's sides.

    $$ \frac{\tau^2}{(4 + \epsilon) \sum_i r_i} \sum_i r_i \sum_{e=1}^{4} \mathrm{KL}(p^t_{i,e} \,\Vert\, p^s_{i,e}) $$

    Args:
        student_boxes: Logits of the distributions that the teacher's head predicts for the student's feature
            `(N, 4 * M)`, M = reg_max + 1 for each side.
        teacher_boxes: Logits of the teacher's distributions `(N, 4 * M)`.
        quality: Weight r of each position `(N,)`: the teacher's largest class probability.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Wang et al.: CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024 (arXiv 2306.11369).

    Example:
        >>> boxes = torch.rand(3, 4 * 17)
        >>> crosskd_box_loss(boxes, boxes, torch.ones(3)).item()
        0.0
    """
    divergence = box_divergence(student_boxes, teacher_boxes, temperature)
    return (quality * divergence).sum() / quality.sum().clamp(min=1e-12) / (4 + _EPS)


@check_shapes(student_feature="B D H W", teacher_feature="B D H' W'")
@full_precision
def crosskd_aligned(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-6) -> Tensor:
    """Give the channels of a student feature map the mean and the standard deviation of the teacher's.

    Both are computed over batch and pixels, the standard deviation without bias.

    Args:
        student_feature: Student feature map `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H', W')`.
        eps: Constant added to the student's standard deviations.

    Returns:
        Feature map `(B, D, H, W)` (float32 for half-precision inputs).

    Raises:
        ValueError: If a channel has a single value, that is, for one sample of one pixel.

    References:
        Wang et al.: CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024 (arXiv 2306.11369),
        following the authors' code.

    Example:
        >>> feature = torch.rand(2, 3, 4, 4)
        >>> torch.allclose(crosskd_aligned(5 * feature + 1, feature), feature, atol=1e-5)
        True
    """
    std, mean = moments("crosskd_aligned", teacher_feature)
    return standardized("crosskd_aligned", student_feature, eps) * std + mean


class CrossKD(DistillLoss):
    """Cross-head distillation: compare the predictions of the teacher's head for both networks' features.

    The student's feature map gets the mean and standard deviation of the teacher's (`crosskd_aligned`) and passes
    through the teacher's head, which is not trained. Its class logits are compared with the teacher's
    (`crosskd_class_loss`), and so are the distributions that a second head predicts for the sides of boxes
    (`crosskd_box_loss`), if there is one. This avoids conflicts between the labels and the teacher in the student's own
    head. The sums run over the positions of all layers and all images of a process. The class term is divided by the
    sum of the teacher's largest class probabilities, at least 1. The terms are logged as `train/crosskd_class` and
    `train/crosskd_box`.

    A 1x1 convolution that is trained with the student maps its channels to the teacher's where the numbers differ. The
    student's maps are interpolated to the size of the teacher's.

    The authors weight the positions by the label assignment of the detector and divide the class term by the number of
    positive positions; a criterion does not know this assignment, so all positions have the same weight.

    Args:
        student_layers: Student layers that return the inputs of the class head, one for each level of an FPN.
        teacher_layers: Teacher layers, one for each student layer.
        teacher_head: Layer of the teacher that maps the outputs of `teacher_layers` to class logits `(B, K, H, W)`: the
            whole head, or its last layers if `student_layers` and `teacher_layers` are within the heads.
        student_box_layers: Student layers that return the inputs of the box head. If empty, the box head receives the
            inputs of the class head.
        teacher_box_layers: Teacher layers, one for each of `student_box_layers`.
        teacher_box_head: Layer of the teacher that maps the inputs of the box head to the logits of distributions
            `(B, 4 * (reg_max + 1), H, W)`; `None` disables the box term.
        beta: Exponent in the class term, at least 1.
        temperature: Temperature of the box term, greater than 0.
        class_weight: Weight of the class term.
        box_weight: Weight of the box term.

    Raises:
        ValueError: If a setting is out of range, or if box layers are given without a box head or in another number
            than `student_layers`. At the start of training, if a head does not exist or does not map the teacher's
            features to maps of the form above.

    References:
        Wang et al.: CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024 (arXiv 2306.11369). The
        defaults are the authors' for GFL on COCO, where the teacher's head takes over after the third of four
        convolutions. For RetinaNet, ATSS and FCOS, they compare decoded boxes by IoU instead; this is not implemented.
    """

    reads_logits = False
    per_process = "alignment statistics, and division by the scores of its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@last_stage",),
        teacher_layers: Sequence[str] = ("@last_stage",),
        teacher_head: str = "@head",
        student_box_layers: Sequence[str] = (),
        teacher_box_layers: Sequence[str] = (),
        teacher_box_head: str | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 4.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        boxes = layer_list("student_box_layers", student_box_layers)
        teacher_boxes = layer_list("teacher_box_layers", teacher_box_layers)
        if boxes and (teacher_box_head is None or len(boxes) != len(student_layers)):
            raise ValueError(
                f"CrossKD requires a teacher_box_head and as many student_box_layers as student_layers, got "
                f"{teacher_box_head}, {len(boxes)} and {len(student_layers)}"
            )
        if not 1 <= beta < math.inf:
            raise ValueError(f"beta must be at least 1, got {beta}; use a finite number, typically 1 or 2")
        check_weights(class_weight=class_weight, box_weight=box_weight)
        self._has_box_layers = bool(boxes)
        self.student_layers += boxes
        self.teacher_layers += teacher_boxes
        self.teacher_head = teacher_head
        self.teacher_box_head = teacher_box_head
        self.beta = beta
        self.temperature = check_temperature(temperature)
        self.class_weight = class_weight
        self.box_weight = box_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the aligning convolutions and find the teacher's heads."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.aligners = nn.ModuleList(aligner(*channels) for channels in channel_pairs(pairs))
        features = [feature for _, feature in pairs]
        classes, boxes = self._by_head(features)
        heads = [self._head(teacher, "teacher_head", self.teacher_head, classes)]
        if self.teacher_box_head is not None:
            heads.append(self._head(teacher, "teacher_box_head", self.teacher_box_head, boxes))
            for feature in boxes:
                predicted = _predicted(heads[1], feature)
                check_boxes("CrossKD", predicted, predicted)
        self._heads = tuple(heads)  # a tuple, so that they are not registered as submodules

    def _by_head(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the inputs of the class head and of the box head."""
        levels = len(features) // 2 if self._has_box_layers else len(features)
        return features[:levels], features[-levels:]

    def _head(self, teacher: Probe, setting: str, name: str, features: list[Tensor]) -> nn.Module:
        """Return a layer of the teacher that maps features to maps."""
        (layer,) = resolve_layers(teacher.network, [name])
        layers: dict[str, nn.Module] = dict(teacher.network.named_modules())
        head = layers.get(layer)
        if head is None:
            raise ValueError(f"{type(teacher.network).__name__} has no layer {layer!r}; set {setting} of CrossKD")
        try:
            with torch.no_grad(), evaluating(head):
                found = [_predicted(head, feature) for feature in features]
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"CrossKD applies the teacher's layer {layer!r} to features {tuple(features[0].shape)}, which fails: "
                f"{error}; set teacher layers that return its input, or another {setting}"
            ) from error
        if not all(isinstance(output, Tensor) and output.ndim == 4 for output in found):
            raise ValueError(
                f"CrossKD requires a teacher layer that returns a map (B, C, H, W), but {layer!r} does not; set "
                f"another {setting}"
            )
        return head

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms."""
        student_features, teacher_features = [], []
        for align, (student_feature, teacher_feature) in zip(self.aligners, self.pairs(student, teacher), strict=True):
            height, width = teacher_feature.shape[2:]
            resized = align(interpolated(student_feature, (height, width)))
            student_features.append(crosskd_aligned(resized, teacher_feature))
            teacher_features.append(teacher_feature)
        class_inputs, box_inputs = zip(self._by_head(student_features), self._by_head(teacher_features), strict=True)
        student_logits, teacher_logits = (_predicted_rows(self._heads[0], features) for features in class_inputs)
        quality = wide(teacher_logits.detach()).amax(1).sigmoid()
        loss = crosskd_class_loss(student_logits, teacher_logits, beta=self.beta, avg_factor=quality.sum().clamp(min=1))
        terms = {"class": self.class_weight * loss}
        for head in self._heads[1:]:
            student_boxes, teacher_boxes = (_predicted_rows(head, features) for features in box_inputs)
            loss = crosskd_box_loss(student_boxes, teacher_boxes, quality, self.temperature)
            terms["box"] = self.box_weight * loss
        return terms


def _predicted_rows(head: nn.Module, features: list[Tensor]) -> Tensor:
    """Return the predictions of a head at all positions of all layers `(N, C)`."""
    return torch.cat([rows(_predicted(head, feature)) for feature in features])


def _predicted(head: nn.Module, feature: Tensor) -> Tensor:
    """Apply a head whose parameters receive no gradient."""
    tensors = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    detached = {
        name: tensor.detach().to(feature.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    predicted: Tensor = functional_call(head, detached, (feature,))
    return predicted
