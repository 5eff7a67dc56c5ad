"""Distillation with a reused teacher classifier (SimKD)."""

from __future__ import annotations

from torch import Tensor, nn

from lkd._moved import former_members
from lkd.losses._adapters import bottleneck, pooled_to
from lkd.losses._classifiers import linear_classifier
from lkd.losses._precision import mse
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs, Probe


@former_members(answer="predict")
class SimKD(DistillLoss):
    r"""SimKD: match features for the teacher's own classifier.

    $$ \frac{1}{BDHW} \lVert r(F_s) - F_t \rVert^2 $$

    The projector r is trained with the student: 1x1, 3x3 and 1x1 convolutions without bias, each with BatchNorm and
    ReLU. The larger map is average-pooled to the size of the smaller one first. The criterion holds a frozen copy of
    the teacher's classifier, which is saved in checkpoints. The final student consists of its layers up to the feature
    map, the projector, global average pooling and this classifier. `lkd.SimKDModule` trains, validates and predicts
    with it; other modules would use the student's own classifier, which is not trained by this criterion.

    Args:
        student_layer: Student layer that returns the feature map before global pooling.
        teacher_layer: Teacher layer that returns the feature map before global pooling.
        teacher_head: Classifier of the teacher, a single linear layer.
        factor: Reduction factor: the inner convolutions of the projector have 1 / `factor` of the teacher's channels.

    Raises:
        ValueError: If `factor` is less than 1. At the start of training, if a layer does not return a feature map or
            the classifier is not a single linear layer.

    References:
        Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022 (arXiv 2203.14001), with
        factor 2 and no other loss.
    """

    reads_logits = False

    def __init__(
        self,
        student_layer: str = "@map",
        teacher_layer: str = "@map",
        teacher_head: str = "@head",
        factor: int = 2,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}; it divides the projector's inner width")
        self.teacher_head = teacher_head
        self.factor = factor

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the projector and copy the teacher's classifier."""
        ((student_feature, teacher_feature),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        channels, (height, width) = teacher_feature.shape[1], teacher_feature.shape[2:]
        inner = max(channels // self.factor, 1)
        self.projector = nn.Sequential(
            *bottleneck(student_feature.shape[1], inner, channels), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self._size = height, width
        head = linear_classifier("SimKD", "teacher", teacher, self.teacher_head, channels)
        # a new layer, since deepcopy would copy forward hooks
        self.head = nn.Linear(channels, head.out_features, head.bias is not None)
        for name, tensor in head.named_parameters():
            self.head.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=False))

    def predict(self, student: Outputs) -> Outputs:
        """Predict with the teacher's classifier.

        Args:
            student: Outputs of the student.

        Returns:
            Outputs with the logits of the teacher's classifier and the projected map as the feature `projected_layer`.
        """
        (layer,) = self.student_layers
        projected = self._project(student.features[layer])
        return Outputs(self.head(projected.mean((2, 3))), {**student.features, self.projected_layer: projected})

    @property
    def projected_layer(self) -> str:
        """Name of the projected map among the features returned by `predict`: `<layer>:projected`."""
        return f"{self.student_layers[0]}:projected"

    def _project(self, feature: Tensor) -> Tensor:
        height, width = (min(pair) for pair in zip(feature.shape[2:], self._size, strict=True))
        projected: Tensor = self.projector(pooled_to(feature, (height, width)))
        return projected

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the mean squared error between the projected and the teacher's feature map."""
        ((student_feature, teacher_feature),) = self.pairs(student, teacher)
        projected = student.features.get(self.projected_layer)
        if projected is None:
            projected = self._project(student_feature)
        height, width = projected.shape[2:]
        return mse(projected, pooled_to(teacher_feature, (height, width)))
