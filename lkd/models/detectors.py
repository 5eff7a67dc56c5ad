"""Functions that create small detectors for training from scratch, with torchvision's architectures, and SSDLite."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from lkd.models.detection import FasterRCNNDetector, FCOSDetector, RetinaNetDetector, SSDDetector
from lkd.models.distribution import DistributionHead
from lkd.models.parts import check_counts, initialize_convolutions

_MEAN, _STD = [0.5] * 3, [0.25] * 3
_SCORE = 0.05
"""Score threshold of detections: RetinaNet's threshold, for all architectures."""


class _OriginalSize(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision is not typed
    """Normalize images and pad them to a multiple of the largest stride, without resizing them."""

    def __init__(self, largest_stride: int) -> None:
        super().__init__(0, 0, _MEAN, _STD, size_divisible=max(32, largest_stride))

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the image and its boxes unchanged."""
        return image, target


def _backbone(filters: Sequence[int], channels: int) -> nn.Module:
    """Return a ResNet with one block in each stage, and a feature pyramid with strides 4, 8, ...

    The pyramid has one more level than there are stages.
    """
    check_counts(filters=tuple(filters), channels=channels)
    stem = nn.Sequential(nn.Conv2d(3, filters[0], 3, 2, 1, bias=False), nn.BatchNorm2d(filters[0]), nn.ReLU())
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    inputs = filters[0]
    for number, width in enumerate(filters, 1):
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        stages[f"stage{number}"] = resnet.BasicBlock(inputs, width, 2, shortcut)
        inputs = width
    body = nn.Sequential(stages)
    initialize_convolutions(body)
    names = {f"stage{number}": str(number - 1) for number in range(1, len(filters) + 1)}
    backbone: nn.Module = BackboneWithFPN(body, names, list(filters), channels)
    return backbone


def _strides(filters: Sequence[int]) -> list[int]:
    return [4 * 2**level for level in range(len(filters) + 1)]


def retinanet(
    num_classes: int, filters: tuple[int, ...] = (16, 32, 64), channels: int = 32, num_scales: int = 3
) -> RetinaNetDetector:
    """Create a small RetinaNet that is trained from scratch and does not resize its images.

    Args:
        num_classes: Number of classes, including class 0, the background.
        filters: Number of channels of each stage of the backbone. The pyramid has one more level than there are stages,
            with the strides 4, 8, ...
        channels: Number of channels of the pyramid and of the heads.
        num_scales: Number of anchor sizes at each position, from 4 times to less than 8 times the stride, each with the
            aspect ratios 1/2, 1 and 2.

    Raises:
        ValueError: If a count is less than 1.

    Example:
        >>> import torch
        >>> retinanet(num_classes=5)([torch.zeros(3, 32, 48), torch.zeros(3, 40, 40)]).class_logits.shape[2]
        5
    """
    check_counts(num_classes=num_classes, num_scales=num_scales)
    sizes = tuple(
        tuple(4 * stride * 2 ** (scale / num_scales) for scale in range(num_scales)) for stride in _strides(filters)
    )
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = RetinaNetHead(channels, 3 * num_scales, num_classes)
    network = RetinaNet(_backbone(filters, channels), num_classes, anchor_generator=anchors, head=head)
    network.transform = _OriginalSize(_strides(filters)[-1])
    return RetinaNetDetector(network)


def fcos(
    num_classes: int,
    filters: tuple[int, ...] = (16, 32, 64),
    channels: int = 32,
    num_convs: int = 2,
    reg_max: int | None = None,
) -> FCOSDetector:
    """Create a small FCOS that is trained from scratch and does not resize its images.

    Args:
        num_classes: Number of classes, including class 0, the background.
        filters: Number of channels of each stage of the backbone. The pyramid has one more level than there are stages,
            with the strides 4, 8, ...
        channels: Number of channels of the pyramid and of the heads, a multiple of 32 (GroupNorm).
        num_convs: Number of convolutions of each branch of the head.
        reg_max: Largest distance, in strides, of the distributions that the head predicts for the sides of a box, as
            `LD` requires; 8 covers all but the coarsest level. `None` predicts the distances themselves.

    Raises:
        ValueError: If a count is less than 1, or `channels` is not a multiple of 32.

    Example:
        >>> import torch
        >>> fcos(num_classes=5, reg_max=8)([torch.zeros(3, 32, 48)]).values["head"]["bbox_distribution"].shape[2]
        36
    """
    check_counts(num_classes=num_classes, num_convs=num_convs, reg_max=1 if reg_max is None else reg_max)
    if channels % 32:
        raise ValueError(
            f"channels must be a multiple of 32, since the heads of FCOS normalize 32 groups, got {channels}"
        )
    anchors = AnchorGenerator(tuple((stride,) for stride in _strides(filters)), ((1.0,),) * len(_strides(filters)))
    head = (
        FCOSHead(channels, 1, num_classes, num_convs)
        if reg_max is None
        else DistributionHead(channels, num_classes, num_convs, reg_max)
    )
    network = FCOS(_backbone(filters, channels), num_classes, anchor_generator=anchors, head=head, score_thresh=_SCORE)
    network.transform = _OriginalSize(_strides(filters)[-1])
    return FCOSDetector(network)


def faster_rcnn(
    num_classes: int, filters: tuple[int, ...] = (16, 32, 64), channels: int = 32, head_channels: int = 128
) -> FasterRCNNDetector:
    """Create a small Faster R-CNN that is trained from scratch and does not resize its images.

    Args:
        num_classes: Number of classes, including class 0, the background.
        filters: Number of channels of each stage of the backbone. The pyramid has one more level than there are stages,
            with the strides 4, 8, ...
        channels: Number of channels of the pyramid.
        head_channels: Number of channels of the head that classifies the proposals.

    Raises:
        ValueError: If a count is less than 1.
    """
    check_counts(num_classes=num_classes, head_channels=head_channels)
    strides = _strides(filters)
    anchors = AnchorGenerator(tuple((4 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    names = [str(number) for number in range(len(filters))]
    network = FasterRCNN(
        _backbone(filters, channels),
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 7**2, head_channels),
        box_predictor=FastRCNNPredictor(head_channels, num_classes),
    )
    network.transform = _OriginalSize(_strides(filters)[-1])
    return FasterRCNNDetector(network)


def ssdlite(num_classes: int, weights: str | None = None, weights_backbone: str | None = None) -> SSDDetector:
    """Create torchvision's SSDLite on a MobileNetV3, which resizes its images to 320x320.

    Args:
        num_classes: Number of classes, including class 0, the background.
        weights: Weights of the whole network, such as `COCO_V1`, downloaded once.
        weights_backbone: Weights of the backbone, such as `IMAGENET1K_V1`, downloaded once.
    """
    return SSDDetector(
        ssdlite320_mobilenet_v3_large(weights=weights, num_classes=num_classes, weights_backbone=weights_backbone)
    )
