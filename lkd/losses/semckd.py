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
    r"""How much each layer of the student learns from each of the teacher's, for every sample.

    $$ \alpha_{i l m} = \mathrm{softmax}_m (q_{i l} \cdot k_{i m} / \tau) $$

    Args:
        queries: Of the student's layers, `(B, L, D)`.
        keys: Of the teacher's layers, `(B, M, D)`.
        temperature: Greater than 0; a larger one spreads the attention.

    Returns:
        `(B, L, M)`, with sum 1 over the teacher's layers.

    References:
        Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv 2012.03236).
    """
    return F.softmax(queries @ keys.mT / temperature, dim=2)


@check_shapes(distances="B L M", attention="B L M")
@full_precision
def semckd_loss(distances: Tensor, attention: Tensor) -> Tensor:
    r"""Mean over samples and the student's layers of the attended distances to the teacher's layers.

    $$ \frac{1}{B L} \sum_{i l m} \alpha_{i l m} d_{i l m} $$

    Args:
        distances: Of every layer of the student from every layer of the teacher, `(B, L, M)`.
        attention: `(B, L, M)`.

    Returns:
        A scalar.

    References:
        Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv 2012.03236).

    Example:
        >>> semckd_loss(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.5, 0.5]]])).item()
        2.0
    """
    return (attention * distances).sum(2).mean()


@full_precision
def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each sample's features, `(B,)`."""
    return (student - teacher).square().flatten(1).mean(1)


class _Embedding(nn.Module):
    """A sample's similarities to the samples of its batch, as a vector of length 1."""

    def __init__(self, batch_size: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(batch_size, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    @full_precision  # the products of features soon leave the range of float16
    def forward(self, feature: Tensor) -> Tensor:
        rows = feature.flatten(1)
        hidden = F.relu(_linear(self.linear1, rows @ rows.T))
        return unit_vectors(_linear(self.linear2, hidden), dim=1)


def _linear(layer: nn.Linear, values: Tensor) -> Tensor:
    return F.linear(values, wide(layer.weight), wide(layer.bias))


def _views(features: Sequence[Tensor], number: int) -> list[tuple[Tensor, ...]]:
    """Each view's features, of all layers."""
    return list(zip(*(feature.chunk(number) for feature in features), strict=True))


class SemCKD(DistillLoss):
    r"""Semantic calibration: each layer of the student imitates all layers of the teacher, the similar ones most.

    $$ \frac{1}{B L} \sum_{i l m} \alpha_{i l m} \, \mathrm{mse}(r_{lm}(F_{s,l})_i, F_{t,m,i}), \quad
       \alpha_{i l m} = \mathrm{softmax}_m (q_l(G_{s,l})_i \cdot k_m(G_{t,m})_i / \tau) $$

    G holds the products of the batch's features. Queries q and keys k are two linear layers each, and r is a bottleneck
    of convolutions with BatchNorm; all train with the student. The larger map is averaged to the smaller one's size.

    Queries and keys read as many numbers as a batch has images: they are bound to one size of batches (in each
    process). In a batch of another size this loss is 0, with gradients that are 0; the first one is warned of. Where
    there are several views of each image, G holds the products within each view.

    Args:
        student_layers: Layers of the student whose feature maps it reads.
        teacher_layers: The teacher's; they need not be as many.
        batch_size: Images in a full batch of one process; None: the datamodule's `batch_size`.
        factor: Queries and keys have `batch_size / factor` numbers.
        temperature: Greater than 0; a larger one spreads the attention.

    Raises:
        ValueError: If the factor is below 1 or the temperature not greater than 0, or, in training, a layer returns no
            feature map or the size of batches is not known.

    References:
        Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv 2012.03236). The authors' code
        weighs it with 400, and leaves out incomplete batches altogether, also their labels.
    """

    reads_logits = False
    compares_samples = True
    per_process = "weighs layers by similarities of its images"

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
            raise ValueError(f"factor must be at least 1, got {factor}; the batch size is divided by it")
        self.batch_size = batch_size
        self.factor = factor
        self._warned = False
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make queries, keys and regressors."""
        if self.batch_size is None:
            raise ValueError(
                "SemCKD is bound to one size of batches, and the data does not tell it; use a datamodule with "
                "`batch_size`, or set the criterion's batch_size"
            )
        ours, theirs = self._features(student.outputs, teacher.outputs)
        for own in ours:
            check_dims("SemCKD", 4, student=own)
        for other in theirs:
            check_dims("SemCKD", 4, teacher=other)
        width = max(self.batch_size // self.factor, 1)
        self.queries = nn.ModuleList(_Embedding(self.batch_size, width) for _ in ours)
        self.keys = nn.ModuleList(_Embedding(self.batch_size, width) for _ in theirs)
        self.regressors = nn.ModuleList(
            bottleneck(own.shape[1], 2 * other.shape[1], other.shape[1]) for own, other in product(ours, theirs)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `semckd_loss`; 0 where the batch is not full."""
        ours, theirs = self._features(student, teacher)
        num_images = len(ours[0]) // batch.views
        if num_images != self.batch_size:
            self._warn(num_images)
            return self._nothing(ours)
        pairs = zip(self.regressors, starmap(same_size, product(ours, theirs)), strict=True)
        distances = [_distance(regressor(own), other) for regressor, (own, other) in pairs]
        found = torch.stack(distances, 1).reshape(len(ours[0]), len(ours), len(theirs))
        views = zip(*(_views(features, batch.views) for features in (ours, theirs)), strict=True)
        return semckd_loss(found, torch.cat([self.attention(*view) for view in views]))

    def attention(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """See `semckd_attention`.

        Args:
            student_features: Of the student's layers, `(B, C, H, W)` each, of one view.
            teacher_features: Of the teacher's layers.
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
                f"SemCKD's loss is 0 in a batch of {num_images} images, as it is made for {self.batch_size}; if more "
                "than the last batch are so, set the criterion's batch_size"
            )

    def _nothing(self, features: Sequence[Tensor]) -> Tensor:
        """0, with a gradient for all that trains: DDP waits for it."""
        sums = [wide(tensor).sum() for tensor in (*features, *self.parameters())]
        return 0 * total(sums)
