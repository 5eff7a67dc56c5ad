"""Correlation congruence (CC)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import embedding
from lkd.losses._checks import check_positive
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe

Kernel = Literal["gaussian", "bilinear"]


def _correlations(feature: Tensor, kernel: Kernel, gamma: float, order: int, normalize: bool) -> Tensor:
    """Return the kernel matrix of the samples `(B, B)`."""
    x = unit_vectors(feature.flatten(1), dim=1) if normalize else feature.flatten(1)
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
    r"""Mean squared error between the correlation matrices of the samples.

    $$ \frac{1}{B^2} \lVert K_s - K_t \rVert_F^2, \quad
       K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} (x_i^\top x_j)^p
       \approx e^{-\gamma \lVert x_i - x_j \rVert^2} \text{ for } \lVert x \rVert = 1 $$

    With the bilinear kernel, $K_{ij} = x_i^\top x_j$.

    Args:
        student_feature: Student feature `(B, C, ...)`; all dimensions except the first are flattened.
        teacher_feature: Teacher feature `(B, D, ...)`.
        kernel: `gaussian` or `bilinear`.
        gamma: Inverse width of the Gaussian kernel, greater than 0.
        order: Order P of the Taylor series of the Gaussian kernel, at least 1.
        normalize: Whether features are normalized to unit length first, as the Taylor series assumes.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019 (arXiv 1904.01802). torchdistill uses
        the Frobenius norm without squaring, on features that are not normalized.

    Example:
        >>> import torch
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
    r"""Product of the absolute differences between student and teacher for samples that are adjacent in the batch.

    $$ \frac{1}{B - 1} \sum_{i < B} \sum_c d_{ic} \, d_{i+1,c}, \quad d = |x_s - x_t| $$

    Args:
        student_feature: Student feature `(B, C, *)`; all dimensions except the first are flattened.
        teacher_feature: Teacher feature `(B, C, *)`.

    Returns:
        Scalar loss, 0 for a single sample (float32 for half-precision inputs).

    References:
        Code of Peng et al. (arXiv 1904.01802) in the version of the CIFAR-100 benchmark (Tian et al., arXiv
        1910.10699). It differs from the loss in the paper, which is `cc_loss`.

    Example:
        >>> import torch
        >>> cc_neighbour_loss(torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 1)).item()
        5.0
    """
    difference = (student_feature - teacher_feature).abs().flatten(1)
    return (difference[:-1] * difference[1:]).sum() / max(len(difference) - 1, 1)


class CC(DistillLoss):
    """Correlation congruence: match correlations of samples.

    Linear layers embed the features of both networks in `feat_dim` dimensions. Both layers are trained, so the
    cross-entropy must have a non-zero weight: this loss alone is minimized by constant embeddings.

    Args:
        student_layers: Student layers whose features are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        feat_dim: Size of the embeddings; `None` compares the features directly.
        form: `kernel` for the loss of the paper (`cc_loss`), or `neighbours` for the loss of the benchmark
            (`cc_neighbour_loss`), which uses none of the settings below and no normalization.
        kernel: `gaussian` or `bilinear`.
        gamma: Inverse width of the Gaussian kernel, greater than 0.
        order: Order of the Taylor series of the Gaussian kernel, at least 1.
        normalize: Whether embeddings are normalized to unit length first.

    Raises:
        ValueError: If `gamma` is not greater than 0, or if `order` or `feat_dim` is less than 1. At the start of
            training, if `form` is `neighbours`, `feat_dim` is `None` and the feature shapes differ.

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019 (arXiv 1904.01802). The results of the
        CIFAR-100 benchmark are those of `form: neighbours` with the weight 0.02. torchdistill's configuration for
        ImageNet has the weight 0.003, for its own variant of the kernel form (see `cc_loss`).
    """

    reads_logits = False
    compares_samples = True
    per_process = "correlations between images"

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
        check_positive("the paper uses 0.4", gamma=gamma)
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
        """Whether embeddings need to be created."""
        return self.feat_dim is not None

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the embeddings."""
        pairs = self.pairs(student.outputs, teacher.outputs)
        if self.feat_dim is None:
            shapes = [tuple(tuple(feature.shape) for feature in pair) for pair in pairs]
            if self.form == "neighbours" and (wrong := [pair for pair in shapes if pair[0] != pair[1]]):
                raise ValueError(
                    f"CC with form: neighbours and feat_dim: null requires features of equal shape, got {wrong[0][0]} "
                    f"from the student and {wrong[0][1]} from the teacher; set feat_dim"
                )
            return
        self.student_embeddings = nn.ModuleList(
            embedding(student_feature, self.feat_dim) for student_feature, _ in pairs
        )
        self.teacher_embeddings = nn.ModuleList(
            embedding(teacher_feature, self.feat_dim) for _, teacher_feature in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `cc_loss` or `cc_neighbour_loss` over the layers."""
        pairs = self.pairs(student, teacher)
        if self.feat_dim is not None:
            embedded = zip(self.student_embeddings, self.teacher_embeddings, pairs, strict=True)
            pairs = [
                (embed_student(student_feature), embed_teacher(teacher_feature))
                for embed_student, embed_teacher, (student_feature, teacher_feature) in embedded
            ]
        if self.form == "neighbours":
            return total([cc_neighbour_loss(*pair) for pair in pairs])
        return total([cc_loss(*pair, self.kernel, self.gamma, self.order, self.normalize) for pair in pairs])
