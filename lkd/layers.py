"""Which layers of a network can be read, and where the ones that distillation methods speak of lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
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


def feature_layers(network: nn.Module) -> FeatureLayers:
    """Where the features lie: what the network says itself, else what is known of its kind.

    Known are torchvision's ResNets, and the stages of timm's networks; of any network, the classifier is taken to be
    its last linear layer.

    Args:
        network: Any module.

    Returns:
        The names; empty ones where nothing is known.
    """
    own = getattr(network, "feature_layers", None)
    if isinstance(own, FeatureLayers):
        return own
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = linear[-1] if linear else ""
    guess = FeatureLayers(pooled=f"{head}:input" if head else "", head=head)
    if all(hasattr(network, name) for name in ("layer1", "layer4", "avgpool", "fc")):
        return _resnet_layers(network, guess)
    info = getattr(network, "feature_info", None)
    if info:  # timm's: a list of dicts, or an object that has one
        entries = getattr(info, "info", info)
        stages = tuple(entry["module"] for entry in entries if _has_layer(network, entry.get("module", "")))
        return guess._replace(stages=stages)
    return guess


def _has_layer(network: nn.Module, name: str) -> bool:
    return bool(name) and name in dict(network.named_modules())


def _resnet_layers(network: nn.Module, guess: FeatureLayers) -> FeatureLayers:
    stages = tuple(f"layer{number}" for number in range(1, 5))
    last = [f"{stage}.{len(network.get_submodule(stage)) - 1}" for stage in stages]  # type: ignore[arg-type]
    norms = [name for name, _ in network.get_submodule(last[0]).named_children() if re.fullmatch(r"bn\d", name)]
    return guess._replace(
        stem="layer1:input",
        stages=stages,
        preacts=tuple(f"{block}.relu:input" for block in last),  # its last call is behind the sum
        norms=tuple(f"{block}.{norms[-1]}" for block in last) if norms else (),
        map="avgpool:input",
    )


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
        raise ValueError(
            f"it is not known which layers {name} of {type(network).__name__} are; name them (student_layers, "
            "teacher_layers), from those that `lkd layers` lists, or give the network an attribute feature_layers"
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
        example = _blank_image(network)
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in network.named_modules():
            stack.callback(setattr, layer, "training", layer.training)
            stack.callback(layer.register_forward_hook(partial(_record, shapes, name)).remove)
        network.eval()
        network(example)
    return {name: shapes[name] for name, _ in network.named_modules() if name and name in shapes}


def _record(shapes: dict[str, tuple[int, ...]], name: str, layer: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        shapes[name] = tuple(output.shape)


def _blank_image(network: nn.Module) -> Tensor:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.new_zeros(1, module.in_channels, 32, 32)
    raise ValueError(f"{type(network).__name__} has no convolution that tells which images it takes; give an example")
