"""Focal and global distillation for detectors (FGD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lkd.losses._adapters import aligner, channel_pairs
from lkd.losses._attention import channel_attention, spatial_attention
from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._dense import enlarged, maps
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.losses.mgd import mgd_loss
from lkd.types import Batch, Outputs, Predictions, Probe


def _foreground(boxes: Tensor, image_size: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Return, for each pixel of a map of `size`, 1 / area of the smallest box that covers it; 0 without a box."""
    (height, width), (rows, columns) = image_size, size
    x1, y1, x2, y2 = boxes.unbind(1)
    left, right = (x1 / width * columns).floor(), (x2 / width * columns).ceil()
    top, bottom = (y1 / height * rows).floor(), (y2 / height * rows).ceil()
    row, column = (torch.arange(number, device=boxes.device) for number in size)
    vertical = (row >= top[:, None]) & (row <= bottom[:, None])
    horizontal = (column >= left[:, None]) & (column <= right[:, None])
    density = 1 / ((bottom + 1 - top) * (right + 1 - left))
    covered = density[:, None, None] * (vertical[:, :, None] & horizontal[:, None, :])
    return torch.cat([covered, covered.new_zeros(1, *size)]).amax(0)  # without a box, the maximum would not exist


@check_shapes(boxes="N_l 4")
@full_precision
def fgd_masks(
    boxes: Sequence[Tensor], image_sizes: Sequence[tuple[float, float]], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    r"""Weights of the pixels of a feature map inside and outside of boxes.

    $$ M^{fg}_p = \max_{b \ni p} \frac{1}{h_b w_b}, \quad M^{bg}_p = \frac{[M^{fg}_p = 0]}{\sum_q [M^{fg}_q = 0]} $$

    A box covers the rows and columns from the floor of its first to the ceiling of its last coordinate, both included.
    Its height and width, which are not clipped at the border, are counted in pixels of the map.

    Args:
        boxes: Boxes of each image `(N_l, 4)`: x1, y1, x2, y2 in pixels of the image; N_l may be 0.
        image_sizes: Height and width of each image in pixels, or of the larger area that the feature map covers.
        size: Rows and columns of the feature map, which covers the image.

    Returns:
        Weights of the foreground, 0 outside of the boxes, and weights of the background, 0 inside `(B, *size)`.

    References:
        Yang et al.: Focal and Global Knowledge Distillation for Detectors, CVPR 2022 (arXiv 2111.11837).

    Example:
        >>> foreground, background = fgd_masks([torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(32, 32)], (4, 4))
        >>> foreground[0, 0].tolist(), round(background.sum().item(), 4)
        ([0.25, 0.25, 0.0, 0.0], 1.0)
    """
    foreground = torch.stack(
        [_foreground(image_boxes, image_size, size) for image_boxes, image_size in zip(boxes, image_sizes, strict=True)]
    )
    empty = (foreground == 0).to(foreground.dtype)
    return foreground, empty / empty.sum((1, 2), keepdim=True).clamp(min=1)


@check_shapes(student_feature="B D H W", teacher_feature="B D H W", mask="B H W")
@full_precision
def fgd_feature_loss(
    student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, temperature: float = 0.5
) -> Tensor:
    r"""Squared distance of two feature maps, weighted by a mask and the teacher's spatial and channel attention.

    $$ \frac{1}{B} \sum_{i,c,p} M_{i,p} A^t_{i,p} C^t_{i,c} (F_{s,i,c,p} - F_{t,i,c,p})^2, \quad
       A = HW \, \mathrm{softmax}_p (\mathrm{mean}_c |F| / \tau), \quad
       C = D \, \mathrm{softmax}_c (\mathrm{mean}_p |F| / \tau) $$

    Args:
        student_feature: Student feature map `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        mask: Weights of the pixels `(B, H, W)`, as from `fgd_masks`.
        temperature: Temperature of the attention, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Yang et al.: Focal and Global Knowledge Distillation for Detectors, CVPR 2022 (arXiv 2111.11837).

    Example:
        >>> fgd_feature_loss(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 0.25)).item()
        3.0
    """
    pixels = mask * spatial_attention(teacher_feature, temperature)
    channels = channel_attention(teacher_feature, temperature)
    weight = pixels[:, None] * channels[:, :, None, None]
    return (weight * (student_feature - teacher_feature).square()).flatten(1).sum(1).mean()


@check_shapes(student_feature="B D H W", teacher_feature="B D H W")
@full_precision
def fgd_attention_loss(student_feature: Tensor, teacher_feature: Tensor, temperature: float = 0.5) -> Tensor:
    r"""Absolute differences of the spatial and the channel attention, summed over pixels and channels.

    $$ \frac{1}{B} \sum_i \Big( \sum_p |A^s_{i,p} - A^t_{i,p}| + \sum_c |C^s_{i,c} - C^t_{i,c}| \Big) $$

    The spatial attention A and the channel attention C are those of `fgd_feature_loss`.

    Args:
        student_feature: Student feature map `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        temperature: Temperature of the attention, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Yang et al.: Focal and Global Knowledge Distillation for Detectors, CVPR 2022 (arXiv 2111.11837).

    Example:
        >>> feature = torch.tensor([[[[4.0, 0.0]]]])
        >>> round(fgd_attention_loss(feature.flip(3), feature).item(), 2)
        4.0
    """
    pairs = [
        (attention(student_feature, temperature), attention(teacher_feature, temperature))
        for attention in (spatial_attention, channel_attention)
    ]
    return total([(own - other).abs().flatten(1).sum(1).mean() for own, other in pairs])


@full_precision
def _context(feature: Tensor, scores: Tensor) -> Tensor:
    """Return the mean of a map over the pixels, weighted by the softmax of their scores `(B, C, 1, 1)`."""
    weights = scores.flatten(2).softmax(2)
    return (feature.flatten(2) * weights).sum(2)[:, :, None, None]


class _GlobalContext(nn.Module):
    """Global context block: adds a transformed, attention-weighted mean of all pixels to each of them.

    The last convolution starts at 0, so that the block starts as the identity.

    Args:
        channels: Number of channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.scores = nn.Conv2d(channels, 1, 1, bias=False)  # a bias would not change the softmax
        last = nn.Conv2d(inner, channels, 1)
        self.transform = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map with its context added, in single precision or higher."""
        context = _context(feature, self.scores(feature)).to(self.scores.weight.dtype)
        return wide(feature) + wide(self.transform(context))


class FGD(DistillLoss):
    """Focal and global distillation for detectors.

    Foreground and background are distilled separately, each weighted by the teacher's attention (`fgd_feature_loss`
    with `fgd_masks`). The student also matches the teacher's attention (`fgd_attention_loss`) and the relations between
    pixels, which a global context block on each network's map extracts; both blocks are trained with the student. The
    terms are sums over pixels and channels, averaged over the images and summed over the layers. They are logged as
    `train/fgd_foreground`, `train/fgd_background`, `train/fgd_attention` and `train/fgd_relation`.

    A 1x1 convolution maps the student's channels to the teacher's where the numbers differ. Smaller maps are
    interpolated to the size of larger ones. The boxes are read from the key `boxes` of each entry of `Batch.target`.
    Detectors of `lkd.models` state which area their maps cover; other networks must place all images of a batch at the
    top left of an area as large as the largest height and width of the batch. Batches without boxes, as in
    classification and segmentation, consist of background only.

    Args:
        student_layers: Student layers whose feature maps are compared, for example the outputs of an FPN.
        teacher_layers: Teacher layers, one for each student layer.
        foreground_weight: Weight of the foreground.
        background_weight: Weight of the background.
        attention_weight: Weight of the differences in attention.
        relation_weight: Weight of the relations between pixels.
        temperature: Temperature of the attention, greater than 0.

    Raises:
        ValueError: If a weight is negative or the temperature is not greater than 0. At the start of training, if a
            layer does not return a feature map.

    References:
        Yang et al.: Focal and Global Knowledge Distillation for Detectors, CVPR 2022 (arXiv 2111.11837). The defaults
        are the authors' for RetinaNet and GFL; they use weights of 5e-5, 2.5e-5, 5e-5 and 5e-7 for two-stage detectors,
        and 1.6e-3, 8e-4, 8e-4 and 8e-6 with temperature 0.8 for FCOS. Their code divides the boxes by the size of an
        image without its padding, which shifts the boxes of images that are padded; here, they are divided by the size
        of the padded batch.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_weights(foreground_weight=foreground_weight, background_weight=background_weight)
        check_weights(attention_weight=attention_weight, relation_weight=relation_weight)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.attention_weight = attention_weight
        self.relation_weight = relation_weight
        self.temperature = check_temperature(temperature)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the aligning convolutions and the global context blocks."""
        channels = channel_pairs(maps(self, student.outputs, teacher.outputs))
        self.aligners = nn.ModuleList(aligner(*pair) for pair in channels)
        self.student_blocks = nn.ModuleList(_GlobalContext(width) for _, width in channels)
        self.teacher_blocks = nn.ModuleList(_GlobalContext(width) for _, width in channels)

    def boxes(self, batch: Batch) -> tuple[list[Tensor], tuple[int, int]] | None:
        """Return the boxes of each image and the size of the area in which the networks place the images.

        Args:
            batch: Batch with a list of dicts that contain `boxes` `(N_i, 4)` as its target, or any other batch.

        Returns:
            Boxes, and height and width in pixels; `None` if the batch has no boxes.
        """
        target: object = batch.target
        if not isinstance(target, (list, tuple)):
            return None
        height, width = (max(image.shape[dim] for image in batch.input) for dim in (-2, -1))
        return [entry["boxes"] for entry in target], (height, width)

    def _masks(self, feature: Tensor, teacher: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `fgd_masks` for a feature map."""
        samples, _, rows, columns = feature.shape
        found, predictions = self.boxes(batch), cast("object", teacher.logits)
        boxes, image_size = found or ([feature.new_zeros(0, 4)] * samples, (rows, columns))
        sizes = predictions.areas if isinstance(predictions, Predictions) else [image_size] * len(boxes)
        return fgd_masks(boxes, sizes, (rows, columns))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the four terms, summed over the layers."""
        levels = zip(self.aligners, self.student_blocks, self.teacher_blocks, maps(self, student, teacher), strict=True)
        terms: dict[str, list[Tensor]] = {"foreground": [], "background": [], "attention": [], "relation": []}
        for align, student_block, teacher_block, pair in levels:
            student_feature, teacher_feature = enlarged(*pair)
            student_feature = align(student_feature)
            foreground, background = self._masks(teacher_feature, teacher, batch)
            terms["foreground"].append(fgd_feature_loss(student_feature, teacher_feature, foreground, self.temperature))
            terms["background"].append(fgd_feature_loss(student_feature, teacher_feature, background, self.temperature))
            terms["attention"].append(fgd_attention_loss(student_feature, teacher_feature, self.temperature))
            terms["relation"].append(mgd_loss(student_block(student_feature), teacher_block(teacher_feature)))
        weights = {name: vars(self)[f"{name}_weight"] for name in terms}
        return {name: weights[name] * total(values) for name, values in terms.items()}
