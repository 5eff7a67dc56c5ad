"""Detectors: torchvision's detection networks, whose losses and detections are computed on demand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.poolers import initLevelMapper

from lkd._compat import tree_map_only
from lkd.features.layers import FeatureLayers
from lkd.types import Predictions

Targets = Sequence[Mapping[str, Tensor]]
Sizes = tuple[tuple[int, int], ...]


class Detector(nn.Module, ABC):
    """Base class of detectors for `lkd.tasks.Detection`.

    torchvision's networks return losses in training mode and detections in eval mode. A detector returns `Predictions`
    in both, from which it computes losses and detections on demand: validation logs a loss, a frozen teacher computes
    neither, and criteria read the predictions.

    The outputs of `pyramid.0`, `pyramid.1`, ... are the levels of the feature pyramid.

    Args:
        network: Detection network of torchvision, with or without trained weights. It normalizes and resizes its images
            itself; the pixels of the input are in [0, 1].
        num_levels: Number of levels of its feature pyramid.

    Attributes:
        network: The network.
    """

    def __init__(self, network: nn.Module, num_levels: int) -> None:
        super().__init__()
        self.network: Any = network
        self.pyramid = nn.ModuleList(nn.Identity() for _ in range(num_levels))

    @property
    def feature_layers(self) -> FeatureLayers:
        """Layers that criteria refer to by name: `@pyramid`."""
        return FeatureLayers(pyramid=_names("pyramid", self.pyramid))

    def forward(self, input: Tensor | Sequence[Tensor]) -> Predictions:
        """Compute the predictions for images of the same or of different sizes.

        Args:
            input: Images `(B, C, H, W)`, or a list of images `(C, H_i, W_i)`.
        """
        images, _ = self.network.transform(list(input))
        features = self.network.backbone(images.tensors)
        levels = features if isinstance(features, Mapping) else {"0": features}
        levels = OrderedDict(
            (name, tap(level)) for tap, (name, level) in zip(self.pyramid, levels.items(), strict=True)
        )
        sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in input)
        return self.predict(images, levels, sizes)

    @abstractmethod
    def predict(self, images: ImageList, levels: OrderedDict[str, Tensor], sizes: Sizes) -> Predictions:
        """Compute the predictions from the levels of the pyramid.

        Args:
            images: Images, resized and padded to the same size.
            levels: Levels of the pyramid by name.
            sizes: Height and width of each image before it was resized.
        """

    @abstractmethod
    def losses(self, predictions: Predictions, target: Targets) -> dict[str, Tensor]:
        """Compute the terms of the network's loss; see `Predictions.losses`."""

    @abstractmethod
    def detections(self, predictions: Predictions) -> list[dict[str, Tensor]]:
        """Select the best boxes of each image; see `Predictions.detections`."""

    def predictions(
        self, images: ImageList, sizes: Sizes, num_classes: int, class_logits: Tensor | None, values: dict[str, Any]
    ) -> Predictions:
        """Create the predictions, and store how the images were resized.

        Args:
            images: Images, resized and padded to the same size.
            sizes: Height and width of each image before it was resized.
            num_classes: Number of classes, including the background.
            class_logits: Class logits of all anchors `(B, N, K)`, if there are any.
            values: Tensors from which losses and detections are computed.
        """
        padded = images.tensors.shape[-2:]
        areas = tuple(
            (padded[0] * own[0] / new[0], padded[1] * own[1] / new[1])
            for own, new in zip(sizes, images.image_sizes, strict=True)
        )
        values |= {"resized": images.image_sizes, "sizes": sizes}
        return Predictions(self, num_classes, areas, class_logits, values)


class OneStageDetector(Detector):
    """Base class of detectors that predict classes and boxes at each position of the pyramid.

    The outputs of `class_maps.0`, ... and `box_maps.0`, ... are the predictions of each level as maps, although the
    levels of RetinaNet and FCOS share one head.

    Args:
        network: Detection network of torchvision.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, len(network.anchor_generator.num_anchors_per_location()))  # type: ignore[operator, union-attr]
        self.class_maps, self.box_maps = (nn.ModuleList(nn.Identity() for _ in self.pyramid) for _ in range(2))

    @property
    def feature_layers(self) -> FeatureLayers:
        """Layers that criteria refer to by name: `@pyramid`, `@class_maps` and `@box_maps`."""
        return FeatureLayers(
            pyramid=_names("pyramid", self.pyramid),
            class_maps=_names("class_maps", self.class_maps),
            box_maps=_names("box_maps", self.box_maps),
        )

    def predict(self, images: ImageList, levels: OrderedDict[str, Tensor], sizes: Sizes) -> Predictions:
        """Apply the heads to all levels."""
        features = list(levels.values())
        head = {name: output.float() for name, output in self.network.head(features).items()}  # boxes require float32
        grid = [(level.shape[2], level.shape[3]) for level in features]
        per_position = self.network.anchor_generator.num_anchors_per_location()
        counts = [number * height * width for number, (height, width) in zip(per_position, grid, strict=True)]
        boxes = head.get("bbox_distribution", head["bbox_regression"])
        for taps, output in ((self.class_maps, head["cls_logits"]), (self.box_maps, boxes)):
            for tap, level, size in zip(taps, output.split(counts, 1), grid, strict=True):
                tap(level.unflatten(1, (*size, -1)).permute(0, 3, 4, 1, 2).flatten(1, 2))
        anchors = self.network.anchor_generator(images, [level.float() for level in features])  # as precise as these
        values = {"head": head, "anchors": anchors, "counts": counts}
        return self.predictions(images, sizes, head["cls_logits"].shape[2], head["cls_logits"], values)

    def losses(self, predictions: Predictions, target: Targets) -> dict[str, Tensor]:
        """Compute the terms of the network's loss."""
        return self.terms(resized(target, predictions), predictions.values)

    @abstractmethod
    def terms(self, target: Targets, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the terms of the network's loss.

        Args:
            target: Targets in pixels of the resized images.
            values: Outputs of the heads and anchors, from `Predictions.values`.
        """

    def detections(self, predictions: Predictions) -> list[dict[str, Tensor]]:
        """Select the boxes with the highest scores of each level, and apply non-maximum suppression."""
        values = predictions.values
        head = {name: list(output.split(values["counts"], 1)) for name, output in values["head"].items()}
        anchors = [list(own.split(values["counts"])) for own in values["anchors"]]
        return original(self.network.postprocess_detections(head, anchors, values["resized"]), predictions)


class RetinaNetDetector(OneStageDetector):
    """RetinaNet as a detector.

    Args:
        network: RetinaNet of torchvision.

    References:
        Lin et al.: Focal Loss for Dense Object Detection, ICCV 2017 (arXiv 1708.02002).
    """

    def __init__(self, network: RetinaNet) -> None:
        super().__init__(network)

    def terms(self, target: Targets, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the focal loss and the L1 loss of the boxes."""
        losses: dict[str, Tensor] = self.network.compute_loss(target, values["head"], values["anchors"])
        return losses


class FCOSDetector(OneStageDetector):
    """FCOS as a detector.

    Args:
        network: FCOS of torchvision.

    References:
        Tian et al.: FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019 (arXiv 1904.01355).
    """

    def __init__(self, network: FCOS) -> None:
        super().__init__(network)

    def terms(self, target: Targets, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the focal loss, the generalized IoU loss of the boxes, and the loss of the centerness."""
        losses: dict[str, Tensor] = self.network.compute_loss(
            target, values["head"], values["anchors"], values["counts"]
        )
        return losses


class SSDDetector(OneStageDetector):
    """SSD or SSDLite as a detector.

    Args:
        network: SSD of torchvision.

    References:
        Liu et al.: SSD: Single Shot MultiBox Detector, ECCV 2016 (arXiv 1512.02325).
    """

    def __init__(self, network: SSD) -> None:
        super().__init__(network)

    def terms(self, target: Targets, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the cross-entropy, with the hardest negatives, and the L1 loss of the boxes."""
        matched = [self._matched(own["boxes"], anchors) for own, anchors in zip(target, values["anchors"], strict=True)]
        losses: dict[str, Tensor] = self.network.compute_loss(target, values["head"], values["anchors"], matched)
        return losses

    def _matched(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Return the index of the box to which each anchor is assigned; -1 for the background."""
        if not len(boxes):
            return anchors.new_full((len(anchors),), -1, dtype=torch.int64)
        matched: Tensor = self.network.proposal_matcher(box_iou(boxes, anchors))
        return matched

    def detections(self, predictions: Predictions) -> list[dict[str, Tensor]]:
        """Select the boxes with the highest scores of each class from all levels, and apply non-maximum suppression."""
        values = predictions.values
        found = self.network.postprocess_detections(values["head"], values["anchors"], values["resized"])
        return original(found, predictions)


class FasterRCNNDetector(Detector):
    """Faster R-CNN as a detector.

    The forward pass ends with the feature pyramid, because proposals, losses and detections depend on the targets or on
    the selection of boxes. Criteria read `@pyramid`. In mixed precision, anchors and boxes remain float32: bfloat16
    would round coordinates above 256 to multiples of 2.

    Args:
        network: `FasterRCNN` of torchvision.

    References:
        Ren et al.: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, NeurIPS 2015
        (arXiv 1506.01497).
    """

    def __init__(self, network: FasterRCNN) -> None:
        super().__init__(network, len(network.rpn.anchor_generator.num_anchors_per_location()))
        network.rpn.register_forward_pre_hook(_convert_levels)
        for layer in (network.rpn.head, network.roi_heads.box_predictor):
            layer.register_forward_hook(_convert_output)

    def predict(self, images: ImageList, levels: OrderedDict[str, Tensor], sizes: Sizes) -> Predictions:
        """Store the levels of the pyramid in the predictions."""
        pool_exactly(self.network.roi_heads.box_roi_pool, levels, images.tensors.shape[-2])
        num_classes = self.network.roi_heads.box_predictor.cls_score.out_features
        return self.predictions(images, sizes, num_classes, None, {"images": images.tensors, "levels": levels})

    def losses(self, predictions: Predictions, target: Targets) -> dict[str, Tensor]:
        """Compute the losses of the proposals and of the boxes, from randomly drawn samples."""
        target = resized(target, predictions)
        with self._stages(training=True):
            proposals, first = self.network.rpn(*self._inputs(predictions), target)
            levels, sizes = predictions.values["levels"], predictions.values["resized"]
            _, second = self.network.roi_heads(levels, proposals, sizes, target)
        return {**first, **second}

    def detections(self, predictions: Predictions) -> list[dict[str, Tensor]]:
        """Compute the proposals and, from these, the detections."""
        with self._stages(training=False):
            proposals, _ = self.network.rpn(*self._inputs(predictions))
            levels, sizes = predictions.values["levels"], predictions.values["resized"]
            found, _ = self.network.roi_heads(levels, proposals, sizes)
        return original(found, predictions)

    def _inputs(self, predictions: Predictions) -> tuple[ImageList, OrderedDict[str, Tensor]]:
        values = predictions.values
        return ImageList(values["images"], list(values["resized"])), values["levels"]

    @contextmanager
    def _stages(self, training: bool) -> Iterator[None]:
        """Make both stages return losses or detections, without changing the mode of their layers."""
        stages = self.network.rpn, self.network.roi_heads
        modes = [stage.training for stage in stages]
        try:
            for stage in stages:
                stage.training = training
            yield
        finally:
            for stage, mode in zip(stages, modes, strict=True):
                stage.training = mode


def pool_exactly(pool: MultiScaleRoIAlign, levels: Mapping[str, Tensor], height: int) -> None:
    """Set the scales of the levels from which boxes are pooled, if they are not set.

    torchvision estimates the scales in the first forward pass, from the sizes of the images without padding, and keeps
    them. For small images, they may be wrong by a factor of 2, and a resumed run might use different ones. Strides are
    powers of 2; the sizes of the levels are rounded up if the height is not a multiple of the stride.

    Args:
        pool: Pooling layer, changed in place.
        levels: Levels of the pyramid by name.
        height: Height of the padded images.
    """
    if pool.scales is None:
        pool.scales = [2.0 ** round(math.log2(levels[name].shape[2] / height)) for name in pool.featmap_names]
        first, last = (round(-math.log2(scale)) for scale in (pool.scales[0], pool.scales[-1]))
        pool.map_levels = initLevelMapper(first, last, pool.canonical_scale, pool.canonical_level)


def _convert_levels(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the levels of the pyramid to the dtype of the weights, as their dtype is also that of the anchors."""
    images, levels, *others = args
    dtype = next(layer.parameters()).dtype
    return images, OrderedDict((name, level.to(dtype)) for name, level in levels.items()), *others


def _convert_output(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Convert the output of a layer from the dtype of autocast to that of its weights."""
    dtype = next(layer.parameters()).dtype
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype), output)


def resized(target: Targets, predictions: Predictions) -> list[dict[str, Tensor]]:
    """Return targets in pixels of the resized images.

    Args:
        target: Targets in pixels of the input images.
        predictions: Predictions for these images.
    """
    sizes = zip(target, predictions.values["sizes"], predictions.values["resized"], strict=True)
    return [{**own, "boxes": resize_boxes(own["boxes"], old, new)} for own, old, new in sizes]


def original(detections: list[dict[str, Tensor]], predictions: Predictions) -> list[dict[str, Tensor]]:
    """Return detections in pixels of the input images.

    Args:
        detections: Detections in pixels of the resized images.
        predictions: Predictions for these images.
    """
    sizes = zip(detections, predictions.values["resized"], predictions.values["sizes"], strict=True)
    return [{**own, "boxes": resize_boxes(own["boxes"], old, new)} for own, old, new in sizes]


def _names(group: str, taps: nn.ModuleList) -> tuple[str, ...]:
    return tuple(f"{group}.{number}" for number in range(len(taps)))
