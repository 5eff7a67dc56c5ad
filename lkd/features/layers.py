"""Which layers of a network can be read, and where the ones that distillation methods speak of lie."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GROUPS = "@stem, @stages, @stage1, @stage2, ..., @last_stage, @preacts, @preact1, ..., @norms, @map, @pooled, @head"


class FeatureLayers(NamedTuple):
    """Where the features that distillation methods speak of lie in one network.

    A network says so in an attribute `feature_layers`; criteria name them by `@stem`, `@stages`, ... (see
    `resolve_layers`), so that one setting serves every network.

    Attributes:
        stem: What the first stage reads, `(B, C, H, W)`.
        stages: The stages' last outputs, after their activation, `(B, C, H, W)`.
        preacts: The same before that activation.
        norms: The BatchNorm layers whose outputs `preacts` are, or whose outputs they add to a shortcut.
        map: What the global pooling reads, `(B, C, H, W)`.
        pooled: What the classifier reads, `(B, C)`.
        head: The classifier itself.
    """

    stem: str = ""
    stages: tuple[str, ...] = ()
    preacts: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    map: str = ""
    pooled: str = ""
    head: str = ""


def uncompiled(network: nn.Module) -> nn.Module:
    """The network itself where `torch.compile(network)` has wrapped it, so that names stay what they were.

    Args:
        network: Any module.
    """
    inner = getattr(network, "_orig_mod", network)
    return inner if isinstance(inner, nn.Module) else network


def feature_layers(network: nn.Module) -> FeatureLayers:
    """Where the features lie: what the network says itself, else what is known of its kind.

    Known are torchvision's and timm's ResNets, and of timm's other networks the stages, where these are modules: all
    that timm's `feature_info` names, but the end of a stem; what the stem hands to the first stage is `stem` then. A
    ViT's stages are its blocks, which return tokens `(B, N, C)`; a network whose maps have their channels last (Swin)
    has none. Of any network, the classifier is taken to be its last linear layer, and `map` is known where `avgpool`,
    `global_pool` or `head.global_pool` pools all pixels of a map.

    Args:
        network: Any module.

    Returns:
        The names; empty ones where nothing is known.
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
_POOLINGS = ("avgpool", "global_pool", "head.global_pool")  # torchvision's, and timm's two
_TIMM_STEM = re.compile(r"(conv_)?stem(\.|$)|(act|bn|conv)\d$|layer0$|features\.norm0$")
_CHANNELS_LAST = ("VOLO", "VisionTransformerSAM")  # others of timm's say so: output_fmt


def _pools_all(layer: nn.Module | None) -> bool:
    """Whether a layer makes one value of each channel: torchvision's `avgpool` leaves more in some networks."""
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return layer.output_size in (1, (1, 1))
    return type(layer).__name__ == "SelectAdaptivePool2d"


def _resnet_layers(network: nn.Module, guess: FeatureLayers) -> FeatureLayers:
    """Torchvision's ResNets, and timm's, which have one activation for each sum and call it otherwise."""
    last = {stage: list(network.get_submodule(stage).named_children())[-1] for stage in _RESNET}
    preacts, norms = [], []
    for stage, (number, block) in last.items():
        parts = dict(block.named_children())
        found = sorted(name for name in parts if re.fullmatch(r"bn\d", name))
        act = next((name for name in (f"act{found[-1][-1]}" if found else "", "relu") if name in parts), "")
        preacts += [f"{stage}.{number}.{act}:input"] if act else []  # `relu` is called last behind the sum
        # what squeeze and excitation scales is no longer what the BatchNorm returned
        norms += [f"{stage}.{number}.{found[-1]}"] if found and not isinstance(parts.get("se"), nn.Module) else []
    return guess._replace(stem="layer1:input", stages=_RESNET, preacts=tuple(preacts), norms=tuple(norms))


def _timm_layers(network: nn.Module, layers: Mapping[str, nn.Module], guess: FeatureLayers) -> FeatureLayers:
    """What timm calls features: the stages, and before them, in some networks, the end of the stem."""
    info: Any = getattr(network, "feature_info", None) or []
    entries: list[str] = [entry.get("module", "") for entry in getattr(info, "info", info)]  # a list, or one in it
    has_stem = bool(entries and _TIMM_STEM.match(entries[0]))
    stages = tuple(entries[has_stem:])
    if not stages or not all(name and name in layers for name in stages):  # HRNet's have no module of their own
        return guess
    return guess._replace(stem=f"{stages[0]}:input" if has_stem else "", stages=stages)


def resolve_layers(network: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Replace `@stages` and the like by the network's own names of these layers; other names stay.

    Args:
        network: Any module.
        names: Names of layers, or `@stem`, `@stages` (all), `@stage1`, `@stage2`, ..., `@last_stage`, `@preacts`
            (all), `@preact1`, ..., `@norms`, `@map`, `@pooled`, `@head`: see `FeatureLayers`.

    Returns:
        Names as in `network.named_modules()`, with `:input` behind where what goes into the layer is meant.

    Raises:
        ValueError: If there is no such group, or it is not known where it lies in this network.

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
    numbered = re.fullmatch(r"@(stage|preact|norm)(\d+)", name)
    if numbered:
        group = getattr(layers, f"{numbered[1]}s")
        found = group[int(numbered[2]) - 1 : int(numbered[2])] if int(numbered[2]) else ()
    elif name == "@last_stage":
        found = layers.stages[-1:]
    elif name[1:] in FeatureLayers._fields:
        found = getattr(layers, name[1:])
    else:
        raise ValueError(f"there is no group of layers {name!r}; there are {GROUPS}")
    found = (found,) if isinstance(found, str) else found
    if not found or not all(found):
        kind = type(uncompiled(network)).__name__
        raise ValueError(
            f"it is not known which layers {name} of {kind} are; name them (student_layers, teacher_layers), from "
            "those that `lkd layers` lists, or give the network an attribute feature_layers"
        )
    return tuple(found)


def layer_names(network: nn.Module, example: Any = None) -> dict[str, tuple[int, ...]]:
    """Name the layers that can be tapped, with the shapes of what they return.

    The network runs once, in eval mode and without gradients; its modes and statistics stay as they were.

    Args:
        network: Any module.
        example: What the network takes; None stands for a blank image of 32x32 pixels, with the channels that its
            first convolution takes.

    Returns:
        Name, as in `network.named_modules()`, to shape, in the network's order. Layers that the pass does not reach,
        or that return something other than a tensor, are left out; of several calls the last counts.

    Raises:
        ValueError: If there is no example and no convolution either.

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
    """The device of a network's weights; the CPU if it has none.

    While `setup` runs, a LightningModule's `device` is already the GPU, but its weights are still on the CPU: what is
    to meet the weights belongs where they are.

    Args:
        network: Any module.
    """
    tensors = chain(network.parameters(), network.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set a network to eval mode, and each of its layers to the mode that it had afterwards.

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
    """An image of zeros that a network can take.

    Args:
        network: Any module.
        size: The image's size, or its height and width, or its channels, height and width; by default with the channels
            that the network's first convolution takes.

    Returns:
        `(1, C, H, W)`, where and of the type that the network is.

    Raises:
        ValueError: If the channels are not given and there is no convolution.
    """
    if len(size) < 3:
        channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
        if channels is None:
            raise ValueError(
                f"{type(network).__name__} has no convolution that tells how many channels its images have; give an "
                "example (lkd layers: --input_size CHANNELS HEIGHT WIDTH)"
            )
        size = [channels, size[0], size[-1]]
    like = next((weight for weight in network.parameters() if weight.is_floating_point()), torch.empty(0))
    return like.new_zeros(1, *size)
