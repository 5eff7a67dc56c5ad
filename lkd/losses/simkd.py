"""Distillation with a reused teacher classifier (SimKD)."""

from __future__ import annotations

from torch import Tensor, nn

from lkd.losses._adapters import bottleneck, pooled_to
from lkd.losses._classifiers import linear_classifier
from lkd.losses._precision import mse
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs, Probe


class SimKD(DistillLoss):
    r"""The student's map, through a projector, is to equal the teacher's, so that the teacher's classifier fits it.

    $$ \frac{1}{BDHW} \lVert r(F_s) - F_t \rVert^2 $$

    The projector r trains with the student: convolutions 1x1, 3x3 and 1x1 without bias, each with BatchNorm and ReLU.
    The larger map is averaged to the smaller one's size first. The criterion keeps a copy of the teacher's classifier,
    which does not train and is saved in checkpoints: the finished student is its layers up to the map, the projector,
    the mean over the pixels, and that classifier. `lkd.SimKDModule` trains, validates and predicts so; with any other
    module the student would be asked for its own classifier, which learns nothing here.

    Args:
        student_layer: Layer of the student whose map the pooling reads.
        teacher_layer: The teacher's.
        teacher_head: The teacher's classifier, one linear layer.
        factor: The projector's inner convolutions have 1 / `factor` of the teacher's channels.

    Raises:
        ValueError: If the factor is below 1, or, in training, a layer returns no feature map or the classifier is
            another kind of layer.

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
            raise ValueError(f"factor must be at least 1, got {factor}; the projector's inner width is divided by it")
        self.teacher_head = teacher_head
        self.factor = factor

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projector, and copy the teacher's classifier."""
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        channels, (height, width) = theirs.shape[1], theirs.shape[2:]
        inner = max(channels // self.factor, 1)
        self.projector = nn.Sequential(*bottleneck(ours.shape[1], inner, channels), nn.BatchNorm2d(channels), nn.ReLU())
        self._size = height, width
        head = linear_classifier("SimKD", "teacher", teacher, self.teacher_head, channels)
        # a new layer, as a deepcopy would take along the hooks of whoever reads this one
        self.head = nn.Linear(channels, head.out_features, head.bias is not None)
        for name, tensor in head.named_parameters():
            self.head.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=False))

    def answer(self, student: Outputs) -> Outputs:
        """What the student says with the teacher's classifier.

        Args:
            student: What the student's own layers said.

        Returns:
            The same with these logits, and the projected map as the feature of `projected_layer`.
        """
        (layer,) = self.student_layers
        projected = self._project(student.features[layer])
        return Outputs(self.head(projected.mean((2, 3))), {**student.features, self.projected_layer: projected})

    @property
    def projected_layer(self) -> str:
        """What the projected map is called among the features that `answer` returns: `<layer>:projected`."""
        return f"{self.student_layers[0]}:projected"

    def _project(self, feature: Tensor) -> Tensor:
        height, width = (min(pair) for pair in zip(feature.shape[2:], self._size, strict=True))
        projected: Tensor = self.projector(pooled_to(feature, (height, width)))
        return projected

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean squared difference of projected and teacher's map."""
        ((ours, theirs),) = self.pairs(student, teacher)
        projected = student.features.get(self.projected_layer)
        if projected is None:
            projected = self._project(ours)
        height, width = projected.shape[2:]
        return mse(projected, pooled_to(theirs, (height, width)))
