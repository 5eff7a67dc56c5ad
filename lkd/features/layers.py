"""Layers of a network whose outputs can be extracted, and the layers that distillation methods refer to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lkd._compat import wrapped_by_compile

GROUPS = (
    "@stem, @stages, @stage1, @stage2, ..., @last_stage, @preacts, @preact1, ..., @norms, @decoder, @decoder1, ..., "
    "@map, @pooled, @head, @pyramid, @pyramid1, ..., @class_maps, @class_map1, ..., @box_maps, @box_map1, ..."
)


class FeatureLayers(NamedTuple):
    """Names of the layers that distillation methods refer to, for one network.

    A network declares them in an attribute `feature_layers`. Criteria refer to them as `@stem`, `@stages`, ... (see
    `resolve_layers`), so that one setting is valid for all networks.

    Attributes:
        stem: Input of the first stage `(B, C, H, W)`.
        stages: Last outputs of the stages, after their activation `(B, C, H, W)`.
        preacts: Last outputs of the stages, before their activation `(B, C, H, W)`.
        norms: BatchNorm layers whose outputs are the `preacts`, or are added to a shortcut to form them.
        decoder: Outputs of the decoder's stages of a segmentation network `(B, C, H, W)`.
        map: Input of the global pooling, or of the head of a segmentation network `(B, C, H, W)`.
        pooled: Input of the classifier `(B, C)`.
        head: The classifier.
        pyramid: Levels of a detector's feature pyramid `(B, C, H, W)`, from fine to coarse.
        class_maps: Class logits of these levels `(B, A * K, H, W)`, for A anchors at each position and K classes.
        box_maps: Predictions of these levels from which boxes are computed `(B, A * D, H, W)`: the logits of
            distributions if the detector predicts them, otherwise D = 4 coordinates.
    """

    stem: str = ""
    stages: tuple[str, ...] = ()
    preacts: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    map: str = ""
    pooled: str = ""
    head: str = ""
    pyramid: tuple[str, ...] = ()
    class_maps: tuple[str, ...] = ()
    box_maps: tuple[str, ...] = ()


def uncompiled(network: nn.Module) -> nn.Module:
    """Return the network wrapped by `torch.compile(network)`, so that layer names are unchanged.

    Args:
        network: Any module; returned as is if it is not compiled.
    """
    inner = wrapped_by_compile(network)
    return inner if isinstance(inner, nn.Module) else network


def feature_layers(network: nn.Module) -> FeatureLayers:
    """Return the feature layers that a network declares, or those known for its architecture.

    Known architectures are the ResNets of torchvision and timm. For other networks of timm, the stages are known if
    they are modules: the entries of timm's `feature_info`, except for the end of a stem, in which case `stem` is the
    input of the first stage. The stages of a ViT are its blocks, which return tokens `(B, N, C)`; networks with
    channels-last feature maps (Swin) have none. In any network, the last linear layer is assumed to be the classifier,
    and `map` is known if `avgpool`, `global_pool` or `head.global_pool` pools all pixels of a feature map.

    Args:
        network: Any module.

    Returns:
        Layer names; empty if unknown.
    """
    network = uncompiled(network)
    own = getattr(network, "feature_layers", None)
    if isinstance(own, FeatureLayers):
        return own
    layers = dict(network.named_modules())
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    head = linear[-1] if linear else ""
    guess = FeatureLayers(pooled=f"{head}:input" if head else "", head=head)
    if getattr(network, "output_fmt", "") == "NHWC" or type(network).__name__ in _CHANNELS_LAST:
        return guess
    pooling = next((name for name in _POOLINGS if _pools_all(layers.get(name))), "")
    guess = guess._replace(map=f"{pooling}:input" if pooling else "")
    if all(name in layers for name in (*_RESNET, "fc")):
        return _resnet_layers(network, guess)
    return _timm_layers(network, layers, guess)


_RESNET = ("layer1", "layer2", "layer3", "layer4")
_POOLINGS = ("avgpool", "global_pool", "head.global_pool")  # one in torchvision, two in timm
_TIMM_STEM = re.compile(r"(conv_)?stem(\.|$)|(act|bn|conv)\d$|layer0$|features\.norm0$")
_CHANNELS_LAST = ("VOLO", "VisionTransformerSAM")  # other networks of timm declare it in output_fmt


def _pools_all(layer: nn.Module | None) -> bool:
    """Return whether a layer returns one value per channel; torchvision's `avgpool` returns more in some networks."""
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return layer.output_size in (1, (1, 1))
    return type(layer).__name__ == "SelectAdaptivePool2d"


def _resnet_layers(network: nn.Module, guess: FeatureLayers) -> FeatureLayers:
    """Return the layers of ResNets from torchvision or timm. The latter have a named activation after each sum."""
    last = {stage: list(network.get_submodule(stage).named_children())[-1] for stage in _RESNET}
    preacts, norms = [], []
    for stage, (number, block) in last.items():
        parts = dict(block.named_children())
        found = sorted(name for name in parts if re.fullmatch(r"bn\d", name))
        act = next((name for name in (f"act{found[-1][-1]}" if found else "", "relu") if name in parts), "")
        preacts += [f"{stage}.{number}.{act}:input"] if act else []  # the last call of `relu` follows the sum
        # squeeze-and-excitation changes the output of the BatchNorm
        norms += [f"{stage}.{number}.{found[-1]}"] if found and not isinstance(parts.get("se"), nn.Module) else []
    return guess._replace(stem="layer1:input", stages=_RESNET, preacts=tuple(preacts), norms=tuple(norms))


def _timm_layers(network: nn.Module, layers: Mapping[str, nn.Module], guess: FeatureLayers) -> FeatureLayers:
    """Return the layers that timm lists as features: the stages, preceded in some networks by the end of the stem."""
    info: Any = getattr(network, "feature_info", None) or []
    entries: list[str] = [entry.get("module", "") for entry in getattr(info, "info", info)]  # a list or a wrapper
    has_stem = bool(entries and _TIMM_STEM.match(entries[0]))
    stages = tuple(entries[has_stem:])
    if not stages or not all(name and name in layers for name in stages):  # stages of HRNet are not modules
        return guess
    return guess._replace(stem=f"{stages[0]}:input" if has_stem else "", stages=stages)


def resolve_layers(network: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Replace `@stages` and similar names by layer names of the network; other names are unchanged.

    Args:
        network: Any module.
        names: Layer names, or `@stem`, `@stages` (all), `@stage1`, `@stage2`, ..., `@last_stage`, `@preacts` (all),
            `@preact1`, ..., `@norms`, `@decoder`, `@decoder1`, ..., `@map`, `@pooled`, `@head`, `@pyramid`,
            `@pyramid1`, ..., `@class_maps`, `@class_map1`, ..., `@box_maps`, `@box_map1`, ...; see `FeatureLayers`.

    Returns:
        Names as in `network.named_modules()`, with the suffix `:input` for the input of a layer.

    Raises:
        ValueError: If a group does not exist or is unknown for this network.

    Example:
        >>> from lkd.models import resnet8
        >>> resolve_layers(resnet8(num_classes=10), ["@stages", "@pooled"])
        ('layer1', 'layer2', 'layer3', 'flatten')
    """
    if not any(name.startswith("@") for name in names):
        return tuple(names)
    layers = feature_layers(network)
    return tuple(found for name in names for found in (_group(network, layers, name) if name[:1] == "@" else (name,)))


def _group(network: nn.Module, layers: FeatureLayers, name: str) -> tuple[str, ...]:
    found: Any = ()
    numbered = re.fullmatch(r"@(stage|preact|norm|decoder|pyramid|class_map|box_map)(\d+)", name)
    if numbered:
        whole = numbered[1] if numbered[1] in FeatureLayers._fields else f"{numbered[1]}s"
        group = getattr(layers, whole)
        found = group[int(numbered[2]) - 1 : int(numbered[2])] if int(numbered[2]) else ()
    elif name == "@last_stage":
        found = layers.stages[-1:]
    elif name[1:] in FeatureLayers._fields:
        found = getattr(layers, name[1:])
    else:
        raise ValueError(f"unknown group of layers {name!r}; available: {GROUPS}")
    found = (found,) if isinstance(found, str) else found
    if not found or not all(found):
        kind = type(uncompiled(network)).__name__
        raise ValueError(
            f"the layers {name} of {kind} are unknown; specify layer names listed by `lkd layers` (student_layers, "
            "teacher_layers), or define the attribute feature_layers in the network"
        )
    return tuple(found)


def layer_names(network: nn.Module, example: Any = None) -> dict[str, tuple[int, ...]]:
    """List the layers whose outputs can be extracted, with the shapes of these outputs.

    The network is run once, in eval mode and without gradients; its training modes and statistics are preserved.

    Args:
        network: Any module.
        example: Input of the network; `None` for a blank image of 32x32 pixels with the number of channels of the first
            convolution.

    Returns:
        Mapping from layer name, as in `network.named_modules()`, to output shape, in the order of the network. Layers
        that are not reached or do not return a tensor are omitted; if a layer is called several times, its last output
        counts.

    Raises:
        ValueError: If there is neither an example nor a convolution.

    Example:
        >>> layer_names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))
        {'0': (1, 8, 30, 30), '1': (1, 7200)}
    """
    if example is None:
        example = blank_image(network)
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack, torch.no_grad(), evaluating(network):
        for name, layer in network.named_modules():
            stack.callback(layer.register_forward_hook(partial(_record, shapes, name)).remove)
        network(example)
    return {name: shapes[name] for name, _ in network.named_modules() if name and name in shapes}


def _record(shapes: dict[str, tuple[int, ...]], name: str, layer: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        shapes[name] = tuple(output.shape)


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's weights; the CPU if it has none.

    During `setup`, the `device` of a LightningModule is already the GPU while its weights are still on the CPU. Tensors
    that are combined with the weights must be on the device of the weights.

    Args:
        network: Any module.
    """
    tensors = chain(network.parameters(), network.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set a network to eval mode, and restore the mode of each of its modules on exit.

    Args:
        network: Any module.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def blank_image(network: nn.Module, size: Sequence[int] = (32,)) -> Tensor:
    """Return an image of zeros as an input of a network.

    Args:
        network: Any module.
        size: Size of the image; or height and width; or channels, height and width. By default, the number of channels
            is that of the network's first convolution.

    Returns:
        Image `(1, C, H, W)`, with the device and dtype of the network.

    Raises:
        ValueError: If the number of channels is not given and there is no convolution.
    """
    if len(size) < 3:
        channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
        if channels is None:
            raise ValueError(
                f"the number of input channels of {type(network).__name__} is unknown, because it has no convolution; "
                "provide an example (lkd layers: --input_size CHANNELS HEIGHT WIDTH)"
            )
        size = [channels, size[0], size[-1]]
    like = next((weight for weight in network.parameters() if weight.is_floating_point()), torch.empty(0))
    return like.new_zeros(1, *size)
