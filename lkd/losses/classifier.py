"""Criteria that look at feature maps through the networks' classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.layers import resolve_layers
from lkd.losses.adapters import bottleneck, pooled_to, projection
from lkd.losses.base import DistillLoss
from lkd.losses.checks import check_weights
from lkd.losses.directions import directions
from lkd.losses.precision import full_precision, mse
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


def _classifier(owner: str, role: str, probe: Probe, layer: str, channels: int) -> nn.Linear:
    """A network's classifier, which must be one linear layer behind the mean of its map over the pixels."""
    (name,) = resolve_layers(probe.network, [layer])
    head = dict(probe.network.named_modules()).get(name)
    if not isinstance(head, nn.Linear) or head.in_features != channels:
        found = "is not there" if head is None else f"is {head}"
        raise ValueError(
            f"{owner} needs a classifier that is one linear layer and reads the mean of the {role}'s map over the "
            f"pixels; the map has {channels} channels, and the layer {name!r} {found}: name another map ({role}_layer) "
            f"or classifier ({role}_head)"
        )
    return head


@check_shapes(feature="B C H W", weight="K C", bias="K")
@full_precision
def class_activation_maps(feature: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""What a linear classifier says of every pixel: its mean over the pixels is the logits.

    $$ M_{ikhw} = \sum_c W_{kc} F_{ichw} + b_k $$

    Args:
        feature: `(B, C, H, W)`: what the global pooling reads.
        weight: The classifier's, `(K, C)`.
        bias: The classifier's, `(K,)`; None: 0.

    Returns:
        `(B, K, H, W)`.

    References:
        Zhou et al.: Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150).

    Example:
        >>> import torch
        >>> feature, head = torch.rand(2, 8, 4, 4), torch.nn.Linear(8, 3)
        >>> maps = class_activation_maps(feature, head.weight, head.bias)
        >>> torch.allclose(maps.mean((2, 3)), head(feature.mean((2, 3))), atol=1e-5)
        True
    """
    dtype = feature.dtype
    return F.conv2d(feature, weight.to(dtype)[:, :, None, None], None if bias is None else bias.to(dtype))


@check_shapes(student_maps="B K H W", teacher_maps="B K H' W'")
@full_precision
def catkd_loss(student_maps: Tensor, teacher_maps: Tensor, resolution: int = 2, normalize: bool = True) -> Tensor:
    r"""Mean squared difference of class activation maps at a low resolution.

    $$ \frac{1}{B K r^2} \sum_{ik} \lVert \phi(M_{s,ik}) - \phi(M_{t,ik}) \rVert^2, \quad
       \phi(M) = \mathrm{pool}_r(M) / \lVert \mathrm{pool}_r(M) \rVert $$

    Args:
        student_maps: `(B, K, H, W)`, one map for each class.
        teacher_maps: `(B, K, H', W')`.
        resolution: r: rows and columns to which both are averaged.
        normalize: Whether each map is divided by its length.

    Returns:
        A scalar; float32 for maps in half precision, else the maps' type.

    References:
        Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023 (arXiv 2304.12777).

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 10, 4, 4)
        >>> catkd_loss(maps, 3 * maps).item() < 1e-12
        True
    """
    student, teacher = (F.adaptive_avg_pool2d(maps, resolution) for maps in (student_maps, teacher_maps))
    if normalize:
        student, teacher = (directions(maps.flatten(2), dim=2) for maps in (student, teacher))
    return F.mse_loss(student, teacher)


class CATKD(DistillLoss):
    """Class attention transfer: for every class, the student is to look where the teacher looks.

    Maps of the classes are made by applying the classifier to every pixel, so any network fits whose classifier is one
    linear layer behind the global average pooling. Both need the same classes.

    Args:
        student_layer: Layer of the student whose map the pooling reads.
        teacher_layer: The teacher's.
        student_head: The student's classifier; None: `student_layer` returns the maps of the classes itself.
        teacher_head: The teacher's; None: `teacher_layer` returns the maps of the classes itself.
        resolution: Rows and columns to which the maps are averaged.
        normalize: Whether each map is divided by its length.

    Raises:
        ValueError: If the resolution is below 1, or, in training, a layer returns no feature map or the classifier is
            another kind of layer.

    References:
        Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023 (arXiv 2304.12777), who replace the
        classifier by a 1x1 convolution before the pooling, which is the same.
    """

    def __init__(
        self,
        student_layer: str = "@map",
        teacher_layer: str = "@map",
        student_head: str | None = "@head",
        teacher_head: str | None = "@head",
        resolution: int = 2,
        normalize: bool = True,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        if resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {resolution}; 2 is usual")
        self.student_head = student_head
        self.teacher_head = teacher_head
        self.resolution = resolution
        self.normalize = normalize

    def build(self, student: Probe, teacher: Probe) -> None:
        """Find the classifiers."""
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        # in a tuple, as they stay parts of the networks
        self._heads = tuple(
            None if layer is None else _classifier("CATKD", role, probe, layer, feature.shape[1])
            for role, probe, layer, feature in (
                ("student", student, self.student_head, ours),
                ("teacher", teacher, self.teacher_head, theirs),
            )
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `catkd_loss`."""
        features = self.pairs(student, teacher)[0]
        ours, theirs = (
            feature if head is None else class_activation_maps(feature, head.weight, head.bias)
            for feature, head in zip(features, self._heads, strict=True)
        )
        # a teacher that trains itself, as a peer does, gets no gradient through its classifier
        return catkd_loss(ours, theirs.detach(), self.resolution, self.normalize)


@check_shapes(feature="B D H W", teacher_feature="B D H' W'", teacher_logits="B K")
@full_precision
def _srrl(
    feature: Tensor, teacher_feature: Tensor, teacher_logits: Tensor, head: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    pooled, teacher_pooled = feature.mean((2, 3)), teacher_feature.mean((2, 3))
    logits = F.linear(pooled, *(tensor.detach().to(pooled.dtype) for tensor in head))
    return F.mse_loss(pooled, teacher_pooled), F.mse_loss(logits, teacher_logits)


@check_shapes(feature="B D H W", teacher_feature="B D H' W'", teacher_logits="B K", weight="K D", bias="K")
def srrl_loss(
    feature: Tensor,
    teacher_feature: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    regression_weight: float = 1.0,
) -> Tensor:
    r"""Mean squared differences of the pooled features, and of what the teacher's classifier makes of them.

    $$ \frac{1}{BD} \lVert x - t \rVert^2 + \lambda \frac{1}{BK} \lVert W x + b - z_t \rVert^2, \quad
       x = \mathrm{mean}_{hw} X, \; t = \mathrm{mean}_{hw} T $$

    Args:
        feature: The student's, with as many channels as the teacher's: `(B, D, H, W)`.
        teacher_feature: `(B, D, H', W')`.
        teacher_logits: `(B, K)`.
        weight: The teacher's classifier, `(K, D)`; it gets no gradient.
        bias: Its bias, `(K,)`; None: 0.
        regression_weight: Weight of the second part.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.
    """
    matching, regression = _srrl(feature, teacher_feature, teacher_logits, [weight] if bias is None else [weight, bias])
    return matching + regression_weight * regression


class SRRL(DistillLoss):
    """Softmax regression: the teacher's classifier must get from the student's features what it gets from its own.

    The student's map goes through a connector that trains with it (1x1 convolution, BatchNorm, ReLU), and is averaged
    over the pixels. Its curves are `train/srrl_fm` (feature matching) and `train/srrl_sr` (softmax regression).

    Args:
        student_layer: Layer of the student whose map the pooling reads.
        teacher_layer: The teacher's.
        teacher_head: The teacher's classifier, one linear layer; it stays as it is.
        regression_weight: Weight of the difference of the logits.

    Raises:
        ValueError: If the weight is negative, or, in training, a layer returns no feature map or the classifier is
            another kind of layer.

    References:
        Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021. The mean squared
        difference of the logits is the authors' code's; the paper also tries other losses there.
    """

    reads_logits = False

    def __init__(
        self,
        student_layer: str = "@map",
        teacher_layer: str = "@map",
        teacher_head: str = "@head",
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__([student_layer], [teacher_layer])
        check_weights(regression_weight=regression_weight)
        self.teacher_head = teacher_head
        self.regression_weight = regression_weight

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the connector, and find the teacher's classifier."""
        ((ours, theirs),) = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.connector = nn.Sequential(*projection(ours.shape[1], theirs.shape[1]), nn.ReLU())
        # in a tuple, as it stays a part of the teacher
        self._head = (_classifier("SRRL", "teacher", teacher, self.teacher_head, theirs.shape[1]),)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The two parts of `srrl_loss`."""
        ((ours, theirs),) = self.pairs(student, teacher)
        head = list(self._head[0].parameters())
        matching, regression = _srrl(self.connector(ours), theirs, teacher.logits, head)
        return {"fm": matching, "sr": self.regression_weight * regression}


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
        head = _classifier("SimKD", "teacher", teacher, self.teacher_head, channels)
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
