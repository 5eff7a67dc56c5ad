"""Functions that create segmentation networks of torchvision and segmentation_models_pytorch by name."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from lkd.features.layers import FeatureLayers, evaluating
from lkd.io.refused import first_line
from lkd.models.downloads import check_hub_weights, timm_weights
from lkd.models.factories import adapt_stem, check_name, find_weights, with_weights

_RESNET = FeatureLayers(
    stem="backbone.layer1:input", stages=tuple(f"backbone.layer{number}" for number in range(1, 5)), head="classifier.4"
)
_MOBILENET = FeatureLayers(stem="backbone.2:input", stages=("backbone.3", "backbone.6", "backbone.12", "backbone.16"))
_FCN = _RESNET._replace(map="classifier.2")  # before the dropout
_DEEPLAB: dict[str, Any] = {"decoder": ("classifier.0",), "map": "classifier.3", "head": "classifier.4"}
_LAYERS = {
    "fcn_resnet50": _FCN,
    "fcn_resnet101": _FCN,
    "deeplabv3_resnet50": _RESNET._replace(**_DEEPLAB),
    "deeplabv3_resnet101": _RESNET._replace(**_DEEPLAB),
    "deeplabv3_mobilenet_v3_large": _MOBILENET._replace(**_DEEPLAB),
    "lraspp_mobilenet_v3_large": _MOBILENET._replace(map="classifier.high_classifier:input"),
}
_CLASSIFIERS = ("classifier.4", "aux_classifier.4", "classifier.low_classifier", "classifier.high_classifier")


def torchvision_segmentation(
    name: Literal[
        "fcn_resnet50",
        "fcn_resnet101",
        "deeplabv3_resnet50",
        "deeplabv3_resnet101",
        "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
    ],
    num_classes: int,
    in_channels: int = 3,
    weights: str | None = None,
    weights_backbone: str | None = None,
    aux_loss: bool = False,
) -> nn.Module:
    """Create a torchvision segmentation network.

    The network returns a dict that contains the logits `(B, num_classes, H, W)` as `out` and, with `aux_loss`, those of
    the auxiliary head as `aux`; `lkd.tasks.SemanticSegmentation` reads both. Its groups of layers are `@stem`,
    `@stages` (four, from a quarter of the resolution on), `@decoder` (the pyramid pooling of DeepLabV3), `@map` (the
    last feature map before the classifier) and `@head` (none in LRASPP, which adds the outputs of two classifiers).

    Args:
        name: Name of the network, as in torchvision.
        num_classes: Number of classes. If pretrained weights have another number, the last layer of each head is
            replaced.
        in_channels: Number of input channels. If pretrained weights have another number, the sum of the first layer's
            kernels is distributed equally over the channels.
        weights: Pretrained weights, such as `COCO_WITH_VOC_LABELS_V1` or `DEFAULT`, downloaded once.
        weights_backbone: Pretrained weights of the backbone alone, such as `IMAGENET1K_V1` or `DEFAULT`, downloaded
            once; ignored if `weights` is set. `None` for both initializes the network randomly.
        aux_loss: Whether the network has an auxiliary head, for training.

    Returns:
        The network.

    Raises:
        ValueError: If the network or the weights are unknown, or an auxiliary head is requested for LRASPP.
        FileNotFoundError: If the weights cannot be downloaded.

    Example:
        >>> network = torchvision_segmentation("lraspp_mobilenet_v3_large", num_classes=5, in_channels=1)
        >>> network.eval()(torch.zeros(1, 1, 64, 64))["out"].shape
        torch.Size([1, 5, 64, 64])
    """
    check_name("torchvision has no segmentation network", name, list(_LAYERS))
    if aux_loss and name.startswith("lraspp"):
        raise ValueError(f"torchvision's {name} supports no auxiliary head; set aux_loss to false")
    if weights is not None:
        network = _trained(name, weights, num_classes, aux_loss)
    else:
        settings = {"weights": None, "num_classes": num_classes, "aux_loss": aux_loss}
        network = _with_backbone(name, weights_backbone, settings)
    trained = weights is not None or weights_backbone is not None
    adapt_stem(network, name, in_channels, small_images=False, trained=trained)
    network.feature_layers = _LAYERS[name]  # type: ignore[assignment]  # nn.Module declares tensors and modules only
    return network


def _trained(name: str, weights: str, num_classes: int, aux_loss: bool) -> nn.Module:
    """Create a network with the weights of a whole network, which include those of an auxiliary head."""
    entry = find_weights(name, weights)
    network = with_weights(name, entry, lambda: torchvision.models.get_model(name, weights=entry))
    if not aux_loss and hasattr(network, "aux_classifier"):
        network.aux_classifier = None  # type: ignore[assignment]  # as torchvision does
    layers = dict(network.named_modules())
    for path in _CLASSIFIERS:
        if path in layers and num_classes != len(entry.meta["categories"]):
            network.set_submodule(path, nn.Conv2d(layers[path].in_channels, num_classes, kernel_size=1))
    return network


def _with_backbone(name: str, weights: str | None, settings: dict[str, Any]) -> nn.Module:
    """Create a network with the weights of a classification network in its backbone, or with none."""
    if weights is None:
        network: nn.Module = torchvision.models.get_model(name, weights_backbone=None, **settings)
        return network
    backbone = name.partition("_")[2]
    entry = find_weights(backbone, weights)
    create = partial(torchvision.models.get_model, name, weights_backbone=entry, **settings)
    return with_weights(backbone, entry, create, "weights_backbone")


def smp_model(
    architecture: str, encoder: str, num_classes: int, in_channels: int = 3, encoder_weights: str | None = None
) -> nn.Module:
    """Create a network of segmentation_models_pytorch; requires `pip install 'lightning-kd[segmentation]'`.

    Its groups of layers are `@stages` (the encoder's maps from a quarter of the resolution on; unknown for encoders in
    which they are not the outputs of layers, such as `mit_b0`), `@decoder`, `@map` (the input of the head) and `@head`.

    Args:
        architecture: Name of the architecture, such as `unet`, `fpn` or `deeplabv3plus`, in upper or lower case.
        encoder: Name of the encoder, such as `resnet18`, or `tu-` and the name of a timm network.
        num_classes: Number of classes.
        in_channels: Number of input channels; segmentation_models_pytorch adapts pretrained weights to it.
        encoder_weights: Pretrained weights of the encoder, such as `imagenet`, downloaded once. `None` initializes the
            encoder randomly.

    Returns:
        The network, which returns logits `(B, num_classes, H, W)`. Most architectures require images whose height and
        width are divisible by 32.

    Raises:
        ValueError: If segmentation_models_pytorch is not installed, or the architecture, the encoder or the weights are
            unknown.
        FileNotFoundError: If the weights cannot be downloaded.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            "smp_model requires segmentation_models_pytorch, which is not installed; run pip install "
            "'lightning-kd[segmentation]'"
        ) from error
    architecture = architecture.lower()  # the classes are named `Unet` and `FPN`
    check_name("segmentation_models_pytorch has no architecture", architecture, list(smp.MODEL_ARCHITECTURES_MAPPING))
    if not encoder.startswith("tu-"):
        check_name("segmentation_models_pytorch has no encoder", encoder, smp.encoders.get_encoder_names())
    if encoder_weights is not None:
        _check_encoder_weights(smp, encoder, encoder_weights)
    settings = {"encoder_name": encoder, "encoder_weights": encoder_weights}
    try:
        network: nn.Module = smp.create_model(architecture, in_channels=in_channels, classes=num_classes, **settings)
    except OSError as error:
        raise FileNotFoundError(
            f"the pretrained weights of {encoder} are not cached and could not be downloaded ({first_line(error)}); "
            "set encoder_weights to null"
        ) from error
    blocks = getattr(network.decoder, "blocks", None)
    decoder = tuple(f"blocks.{number}" for number in range(len(blocks))) if isinstance(blocks, nn.ModuleList) else ()
    network.feature_layers = FeatureLayers(  # type: ignore[assignment]  # nn.Module declares tensors and modules only
        stages=_stages(network.get_submodule("encoder"), in_channels),
        decoder=tuple(f"decoder.{name}" for name in decoder) or ("decoder",),
        map="segmentation_head:input",
        head="segmentation_head.0",
    )
    return network


def _check_encoder_weights(smp: Any, encoder: str, weights: str) -> None:
    if encoder.startswith("tu-"):
        timm_weights(encoder.removeprefix("tu-"), "encoder_weights to null")
        return
    available = smp.encoders.encoders[encoder]["pretrained_settings"]
    check_name(f"the encoder {encoder} of segmentation_models_pytorch has no weights", weights, list(available))
    entry = available[weights]
    check_hub_weights(f"the encoder {encoder}", entry["repo_id"], entry["revision"], "encoder_weights to null")


def _stages(encoder: nn.Module, in_channels: int) -> tuple[str, ...]:
    """Return the layers whose outputs are the encoder's maps from a quarter of the resolution on; empty if unknown."""
    size, outputs = 64, {}

    def record(name: str, layer: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output

    with ExitStack() as stack, torch.no_grad(), evaluating(encoder):
        for name, layer in encoder.named_modules():
            stack.callback(layer.register_forward_hook(partial(record, name)).remove)
        try:
            maps = encoder(torch.zeros(1, in_channels, size, size))
        except (RuntimeError, AssertionError):  # a transformer with a fixed image size
            return ()
    deep = [one for one in maps if isinstance(one, Tensor) and one.numel() and 4 * one.shape[-1] <= size]
    found = [[name for name, output in outputs.items() if output is one] for one in deep]
    if not all(found):
        return ()
    return tuple(f"encoder.{min(names, key=lambda name: name.count('.'))}" for names in found)
