"""Criteria that compare how the samples of a batch lie to one another: student and teacher may differ in size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses.adapters import embedding
from lkd.losses.base import DistillLoss, total
from lkd.losses.checks import check_positive, check_weights
from lkd.losses.directions import directions
from lkd.losses.precision import full_precision
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


def _distances(feature: Tensor, squared: bool, eps: float) -> Tensor:
    """Euclidean distances `(B, B)` over their mean; 0 from a sample to itself."""
    # not by |x|² + |y|² - 2xy, which would lose the digits of close samples far from the origin
    x = feature.flatten(1)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.square().clamp(min=eps) if squared else distance.clamp(min=math.sqrt(eps))
    distance = distance.masked_fill(torch.eye(len(feature), dtype=torch.bool, device=feature.device), 0)
    return distance / (distance.sum() / (distance > 0).sum().clamp(min=1)).clamp(min=torch.finfo(distance.dtype).tiny)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def rkd_distance_loss(
    student_feature: Tensor, teacher_feature: Tensor, squared: bool = False, eps: float = 1e-12
) -> Tensor:
    r"""Huber loss between the distances of all pairs of samples, relative to their mean.

    $$ \frac{1}{B^2} \sum_{ij} h(d_{s,ij} / \mu_s - d_{t,ij} / \mu_t), \quad
       d_{ij} = \sqrt{\max(\lVert x_i - x_j \rVert^2, \epsilon)}, \; d_{ii} = 0, \quad
       h(u) = u^2 / 2 \text{ if } |u| < 1 \text{ else } |u| - 1/2 $$

    $\mu$ is the mean of the distances between two different samples.

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.
        squared: Compare squared distances.
        eps: The least squared distance; nearer samples have no gradient.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). The mean runs over all pairs, also
        of a sample with itself, as in the authors' code; the paper sums over different samples.

    Example:
        >>> feature = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> rkd_distance_loss(10 * feature, feature).item() < 1e-12
        True
    """
    return F.smooth_l1_loss(_distances(student_feature, squared, eps), _distances(teacher_feature, squared, eps))


def _angles(feature: Tensor) -> Tensor:
    """Cosines `(B, B, B)` of the angles at a sample (first) between the directions to two others."""
    x = feature.flatten(1)
    direction = directions(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return direction @ direction.mT


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def rkd_angle_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Huber loss between the angles of all triples of samples.

    $$ \frac{1}{B^3} \sum_{ijk} h(\cos \angle_{s,ijk} - \cos \angle_{t,ijk}), \quad
       \cos \angle_{ijk} = \langle e_{ij}, e_{ik} \rangle, \; e_{ij} = (x_j - x_i) / \lVert x_j - x_i \rVert $$

    with h as in `rkd_distance_loss`. It holds B * B * (B + C) numbers in memory.

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068). The mean runs over all triples, as
        in the authors' code; the paper sums over different samples.

    Example:
        >>> feature = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 1.0]])
        >>> rkd_angle_loss(2 * feature.flip(1) + 1, feature).item() < 1e-12
        True
    """
    return F.smooth_l1_loss(_angles(student_feature), _angles(teacher_feature))


class RKD(DistillLoss):
    """Relational distillation: distances and angles between the samples of a batch are to be the teacher's.

    Features may differ in size; a common scale, and for angles a rotation, costs nothing.

    Args:
        student_layers: Layers of the student whose features it reads, each by itself; the losses are added.
        teacher_layers: The teacher's, as many.
        distance_weight: Weight of `rkd_distance_loss`, at least 0.
        angle_weight: Weight of `rkd_angle_loss`, at least 0; 0 saves its memory, which grows with the batch cubed.
        squared: Compare squared distances.
        eps: The least squared distance, greater than 0; nearer samples have no gradient.

    Raises:
        ValueError: If a weight is negative, or both are 0, or `eps` is not greater than 0.

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068), who weigh the terms 1 and 2 for
        metric learning; 25 and 50 are the CIFAR-100 benchmark's (Tian et al., arXiv 1910.10699).
    """

    reads_logits = False
    compares_samples = True
    per_process = "measures distances and angles of its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        if distance_weight == angle_weight == 0:
            raise ValueError("distance_weight and angle_weight are both 0, so RKD compares nothing; set one of them")
        check_positive("1e-12 is usual", eps=eps)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.squared = squared
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The terms `distance` and `angle`, as weighted, of those whose weight is not 0."""
        pairs, terms = self.pairs(student, teacher), {}
        if self.distance_weight:
            losses = [rkd_distance_loss(ours, theirs, self.squared, self.eps) for ours, theirs in pairs]
            terms["distance"] = self.distance_weight * total(losses)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * total([rkd_angle_loss(ours, theirs) for ours, theirs in pairs])
        return terms


def _similarities(feature: Tensor) -> Tensor:
    """Products `(B, B)` of the samples' features, each row of length 1."""
    x = feature.flatten(1)
    return directions(x @ x.mT, dim=1)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def sp_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Mean squared difference of the similarities between samples.

    $$ \frac{1}{B^2} \lVert \bar{G}_s - \bar{G}_t \rVert_F^2, \quad G = X X^\top, \quad
       \bar{G}_i = G_i / \lVert G_i \rVert \text{ row by row} $$

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv 1907.09682).

    Example:
        >>> feature = torch.rand(4, 8, 2, 2)
        >>> sp_loss(3 * feature, feature).item() < 1e-12
        True
    """
    return F.mse_loss(_similarities(student_feature), _similarities(teacher_feature))


class SP(DistillLoss):
    """Similarity-preserving distillation: images that are alike to the teacher are to be alike to the student.

    Args:
        student_layers: Layers of the student whose features it reads, each by itself; the losses are added.
        teacher_layers: The teacher's, as many.

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv 1907.09682). The CIFAR-100 benchmark
        reads the last stage and weighs it with 3000.
    """

    reads_logits = False
    compares_samples = True
    per_process = "compares its images"

    def __init__(
        self, student_layers: Sequence[str] = ("@last_stage",), teacher_layers: Sequence[str] = ("@last_stage",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `sp_loss` over the layers."""
        return total([sp_loss(ours, theirs) for ours, theirs in self.pairs(student, teacher)])


def _neighbours(feature: Tensor, eps: float) -> Tensor:
    """How near each sample is to every one, as probabilities `(B, B)`."""
    x = feature.flatten(1)
    x = x / (x.norm(dim=1, keepdim=True) + eps)
    similarity: Tensor = (x @ x.mT + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def pkt_loss(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Divergence between the probabilities with which samples are each other's neighbours.

    $$ \frac{1}{B^2} \sum_{ij} p_{t,ij} \log \frac{p_{t,ij} + \epsilon}{p_{s,ij} + \epsilon}, \quad
       p_{ij} = k_{ij} / \sum_j k_{ij}, \; k_{ij} = (\cos(x_i, x_j) + 1) / 2 $$

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.
        eps: Added to probabilities and to the features' lengths.

    Returns:
        A scalar in nats; float32 for features in half precision, else the features' type.

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv 1803.10837). This is the authors' code, with the mean over all pairs; the paper sums.

    Example:
        >>> feature = torch.rand(4, 8)
        >>> pkt_loss(3 * feature, feature).abs().item() < 1e-7
        True
    """
    student, teacher = _neighbours(student_feature, eps), _neighbours(teacher_feature, eps)
    return (teacher * ((teacher + eps).log() - (student + eps).log())).mean()


class PKT(DistillLoss):
    """Probabilistic knowledge transfer: the samples' neighbourhoods are to be the teacher's.

    Args:
        student_layers: Layers of the student whose features it reads, each by itself; the losses are added.
        teacher_layers: The teacher's, as many.
        eps: Added to probabilities and to the features' lengths, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0.

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv 1803.10837). The CIFAR-100 benchmark weighs it with 30000, as it is a mean over all pairs.
    """

    reads_logits = False
    compares_samples = True
    per_process = "finds neighbours among its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("1e-7 is usual", eps=eps)
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `pkt_loss` over the layers."""
        return total([pkt_loss(ours, theirs, self.eps) for ours, theirs in self.pairs(student, teacher)])


Kernel = Literal["gaussian", "bilinear"]


def _correlations(feature: Tensor, kernel: Kernel, gamma: float, order: int, normalize: bool) -> Tensor:
    """The kernel between all samples, `(B, B)`."""
    x = directions(feature.flatten(1), dim=1) if normalize else feature.flatten(1)
    product = x @ x.mT
    if kernel == "bilinear":
        return product
    terms = [(2 * gamma) ** power / math.factorial(power) * product**power for power in range(1, order + 1)]
    return math.exp(-2 * gamma) * (1 + total(terms))


@check_shapes(student_feature="B C ...", teacher_feature="B D ...")
@full_precision
def cc_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    kernel: Kernel = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
) -> Tensor:
    r"""Mean squared difference of the correlations between samples.

    $$ \frac{1}{B^2} \lVert K_s - K_t \rVert_F^2, \quad
       K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} (x_i^\top x_j)^p
       \approx e^{-\gamma \lVert x_i - x_j \rVert^2} \text{ for } \lVert x \rVert = 1 $$

    or, with the bilinear kernel, $K_{ij} = x_i^\top x_j$.

    Args:
        student_feature: `(B, C, ...)`; all dimensions but the first are flattened.
        teacher_feature: `(B, D, ...)`.
        kernel: `gaussian` or `bilinear`.
        gamma: Greater than 0; the Gaussian kernel's inverse width.
        order: At least 1; P, where the Gaussian kernel's Taylor series ends.
        normalize: Bring each feature to length 1 first, for which the series is made.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019 (arXiv 1904.01802). torchdistill
        takes the Frobenius norm without squaring it, of features that are not normalised.

    Example:
        >>> feature = torch.rand(4, 8)
        >>> cc_loss(3 * feature, feature).item() < 1e-12
        True
    """
    student, teacher = (
        _correlations(feature, kernel, gamma, order, normalize) for feature in (student_feature, teacher_feature)
    )
    return F.mse_loss(student, teacher)


@check_shapes(student_feature="B C *", teacher_feature="B C *")
@full_precision
def cc_neighbour_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Product of the differences between student and teacher for samples that are neighbours in the batch.

    $$ \frac{1}{B - 1} \sum_{i < B} \sum_c d_{ic} \, d_{i+1,c}, \quad d = |x_s - x_t| $$

    Args:
        student_feature: `(B, C, *)`; all dimensions but the first are flattened.
        teacher_feature: `(B, C, *)`.

    Returns:
        A scalar, 0 for one sample; float32 for features in half precision, else the features' type.

    References:
        Code of Peng et al. (arXiv 1904.01802) as the CIFAR-100 benchmark (Tian et al., arXiv 1910.10699) has it; it is
        not what the paper says, which `cc_loss` is.

    Example:
        >>> cc_neighbour_loss(torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 1)).item()
        5.0
    """
    difference = (student_feature - teacher_feature).abs().flatten(1)
    return (difference[:-1] * difference[1:]).sum() / max(len(difference) - 1, 1)


class CC(DistillLoss):
    """Correlation congruence: correlations between the samples' embeddings are to be the teacher's.

    Both networks' features go through a linear map to `feat_dim` numbers each. Both maps train, so the labels' loss
    must have its weight: alone, this criterion could be met by embeddings that are all the same.

    Args:
        student_layers: Layers of the student whose features it reads, each by itself; the losses are added.
        teacher_layers: The teacher's, as many.
        feat_dim: Length of the embeddings; None: features are compared as they are.
        form: `kernel`: the paper's, `cc_loss`; `neighbours`: the benchmark's, `cc_neighbour_loss`, which reads none
            of the settings below, nor normalises.
        kernel: `gaussian` or `bilinear`.
        gamma: Greater than 0; the Gaussian kernel's inverse width.
        order: At least 1; where the Gaussian kernel's Taylor series ends.
        normalize: Bring each embedding to length 1 first.

    Raises:
        ValueError: If `gamma` is not greater than 0, `order` or `feat_dim` is less than 1, or, in training, features
            as they are differ in size where neighbours are compared.

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019 (arXiv 1904.01802), who weigh it with
        0.003. The CIFAR-100 benchmark's results are those of `form: neighbours`, weighed with 0.02.
    """

    reads_logits = False
    compares_samples = True
    per_process = "correlates its images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        feat_dim: int | None = 128,
        form: Literal["kernel", "neighbours"] = "kernel",
        kernel: Kernel = "gaussian",
        gamma: float = 0.4,
        order: int = 2,
        normalize: bool = True,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("0.4 is the paper's", gamma=gamma)
        for name, number in (("order", order), ("feat_dim", feat_dim)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.feat_dim = feat_dim
        self.form = form
        self.kernel: Kernel = kernel
        self.gamma = gamma
        self.order = order
        self.normalize = normalize

    @property
    def needs_build(self) -> bool:  # type: ignore[override]
        """Whether there are embeddings to make."""
        return self.feat_dim is not None

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the embeddings."""
        pairs = self.pairs(student.outputs, teacher.outputs)
        if self.feat_dim is None:
            shapes = [(tuple(ours.shape), tuple(theirs.shape)) for ours, theirs in pairs]
            if self.form == "neighbours" and (wrong := [pair for pair in shapes if pair[0] != pair[1]]):
                raise ValueError(
                    f"CC compares the features themselves with form: neighbours; the student's is {wrong[0][0]}, "
                    f"the teacher's {wrong[0][1]}: set feat_dim"
                )
            return
        self.student_embeddings = nn.ModuleList(embedding(ours, self.feat_dim) for ours, _ in pairs)
        self.teacher_embeddings = nn.ModuleList(embedding(theirs, self.feat_dim) for _, theirs in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `cc_loss` or `cc_neighbour_loss` over the layers."""
        pairs = self.pairs(student, teacher)
        if self.feat_dim is not None:
            embeddings = zip(self.student_embeddings, self.teacher_embeddings, strict=True)
            pairs = [(ours(a), theirs(b)) for (ours, theirs), (a, b) in zip(embeddings, pairs, strict=True)]
        if self.form == "neighbours":
            return total([cc_neighbour_loss(*pair) for pair in pairs])
        return total([cc_loss(*pair, self.kernel, self.gamma, self.order, self.normalize) for pair in pairs])
