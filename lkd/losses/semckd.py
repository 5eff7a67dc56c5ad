"""Cross-layer distillation with semantic calibration (SemCKD)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product, starmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import bottleneck, same_size
from lkd.losses._checks import check_dims, check_temperature
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, read_layers, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(queries="B L D", keys="B M D")
@full_precision
def semckd_attention(queries: Tensor, keys: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Attention of each student layer over the teacher layers, for each sample.

    $$ \alpha_{i l m} = \mathrm{softmax}_m (q_{i l} \cdot k_{i m} / \tau) $$

    Args:
        queries: Queries of the student layers `(B, L, D)`.
        keys: Keys of the teacher layers `(B, M, D)`.
        temperature: Softmax temperature, greater than 0; larger values flatten the attention.

    Returns:
        Attention weights `(B, L, M)` that sum to 1 over the teacher layers.

    References:
        Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv 2012.03236).
    """
    return F.softmax(queries @ keys.mT / temperature, dim=2)


@check_shapes(distances="B L M", attention="B L M")
@full_precision
def semckd_loss(distances: Tensor, attention: Tensor) -> Tensor:
    r"""Attention-weighted sum of the distances to the teacher layers, averaged over samples and student layers.

    $$ \frac{1}{B L} \sum_{i l m} \alpha_{i l m} d_{i l m} $$

    Args:
        distances: Distances between student and teacher layers `(B, L, M)`.
        attention: Attention weights `(B, L, M)`.

    Returns:
        Scalar loss.

    References:
        Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv 2012.03236).

    Example:
        >>> semckd_loss(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.5, 0.5]]])).item()
        2.0
    """
    return (attention * distances).sum(2).mean()


@full_precision
def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of each sample's features `(B,)`."""
    return (student - teacher).square().flatten(1).mean(1)


class _Embedding(nn.Module):
    """Embed the similarities of a sample to the samples of its batch in a vector of unit length."""

    def __init__(self, batch_size: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(batch_size, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    @full_precision  # inner products of features exceed the range of float16
    def forward(self, feature: Tensor) -> Tensor:
        rows = feature.flatten(1)
        hidden = F.relu(_linear(self.linear1, rows @ rows.T))
        return unit_vectors(_linear(self.linear2, hidden), dim=1)


def _linear(layer: nn.Linear, values: Tensor) -> Tensor:
    return F.linear(values, wide(layer.weight), wide(layer.bias))


def _views(features: Sequence[Tensor], number: int) -> list[tuple[Tensor, ...]]:
    """Split the features of all layers into views."""
    return list(zip(*(feature.chunk(number) for feature in features), strict=True))


class SemCKD(DistillLoss):
    r"""Semantic calibration: attend from layers to layers.

    $$ \frac{1}{B L} \sum_{i l m} \alpha_{i l m} \, \mathrm{mse}(r_{lm}(F_{s,l})_i, F_{t,m,i}), \quad
       \alpha_{i l m} = \mathrm{softmax}_m (q_l(G_{s,l})_i \cdot k_m(G_{t,m})_i / \tau) $$

    G contains the inner products between the features of a batch. Queries q and keys k are computed by two linear
    layers each, and r is a bottleneck of convolutions with BatchNorm; all of them are trained with the student. The
    larger map is average-pooled to the size of the smaller one.

    Queries and keys have one input per image of the batch, so they require a fixed batch size (in each process). For a
    batch of another size, the loss and its gradients are 0, and a warning is issued once. With several views of each
    image, G contains the inner products within each view.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers; their number may differ from the number of student layers.
        batch_size: Number of images in a full batch of one process; `None` takes the data module's `batch_size`.
        factor: Reduction factor: queries and keys have `batch_size / factor` dimensions.
        temperature: Softmax temperature of the attention, greater than 0; larger values flatten it.

    Raises:
        ValueError: If `factor` is less than 1 or the temperature is not greater than 0. At the start of training, if a
            layer does not return a feature map or the batch size is unknown.

    References:
        Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv 2012.03236). The authors' code
        uses the weight 400 and skips incomplete batches entirely, including their cross-entropy.
    """

    reads_logits = False
    compares_samples = True
    per_process = "layer weights from similarities between images"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        batch_size: int | None = None,
        factor: int = 4,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}; it divides the batch size")
        self.batch_size = batch_size
        self.factor = factor
        self._warned = False
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create queries, keys and regressors."""
        if self.batch_size is None:
            raise ValueError(
                "SemCKD requires a fixed batch size, which the data module does not provide; use a data module with "
                "`batch_size`, or set the criterion's batch_size"
            )
        student_features, teacher_features = self._features(student.outputs, teacher.outputs)
        for feature in student_features:
            check_dims("SemCKD", 4, student=feature)
        for feature in teacher_features:
            check_dims("SemCKD", 4, teacher=feature)
        width = max(self.batch_size // self.factor, 1)
        self.queries = nn.ModuleList(_Embedding(self.batch_size, width) for _ in student_features)
        self.keys = nn.ModuleList(_Embedding(self.batch_size, width) for _ in teacher_features)
        self.regressors = nn.ModuleList(
            bottleneck(student_feature.shape[1], 2 * teacher_feature.shape[1], teacher_feature.shape[1])
            for student_feature, teacher_feature in product(student_features, teacher_features)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `semckd_loss`, or 0 for incomplete batches."""
        student_features, teacher_features = self._features(student, teacher)
        num_images = len(student_features[0]) // batch.views
        if num_images != self.batch_size:
            self._warn(num_images)
            return self._zero(student_features)
        pairs = zip(self.regressors, starmap(same_size, product(student_features, teacher_features)), strict=True)
        distances = [
            _distance(regressor(student_feature), teacher_feature)
            for regressor, (student_feature, teacher_feature) in pairs
        ]
        distance = torch.stack(distances, 1).reshape(
            len(student_features[0]), len(student_features), len(teacher_features)
        )
        views = zip(*(_views(features, batch.views) for features in (student_features, teacher_features)), strict=True)
        return semckd_loss(distance, torch.cat([self.attention(*view) for view in views]))

    def attention(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """Compute `semckd_attention`.

        Args:
            student_features: Features of the student layers for one view, `(B, C, H, W)` each.
            teacher_features: Features of the teacher layers.
        """
        queries = [query(feature) for query, feature in zip(self.queries, student_features, strict=True)]
        keys = [key(feature) for key, feature in zip(self.keys, teacher_features, strict=True)]
        return semckd_attention(torch.stack(queries, 1), torch.stack(keys, 1), self.temperature)

    def _features(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        return read_layers(student, self.student_layers), read_layers(teacher, self.teacher_layers)

    def _warn(self, num_images: int) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            from lightning.pytorch.utilities import rank_zero_warn

            self._warned = True
            rank_zero_warn(
                f"SemCKD's loss is 0 for a batch of {num_images} images, as it requires {self.batch_size}; if this "
                "affects more than the last batch of an epoch, set the criterion's batch_size"
            )

    def _zero(self, features: Sequence[Tensor]) -> Tensor:
        """Return 0 with a gradient for all trained tensors, which DDP waits for."""
        sums = [wide(tensor).sum() for tensor in (*features, *self.parameters())]
        return 0 * total(sums)
