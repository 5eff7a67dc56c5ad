"""Functions that create networks of torchvision and timm by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import nn

from lkd.features.layers import evaluating
from lkd.io.refused import first_line
from lkd.models.downloads import hub_file, timm_weights, unreachable


def torchvision_model(
    name: str, num_classes: int, in_channels: int = 3, weights: str | None = None, small_images: bool = False
) -> nn.Module:
    """Create a torchvision classification network.

    Args:
        name: Name of the network, from `torchvision.models.list_models(torchvision.models)`, such as `resnet18`.
        num_classes: Number of classes. If pretrained weights have another number, the last layer is replaced.
        in_channels: Number of input channels. If pretrained weights have another number, the sum of the first layer's
            kernels is distributed equally over the channels, which preserves the outputs for images with equal
            channels.
        weights: Pretrained weights, such as `IMAGENET1K_V1` or `DEFAULT`, downloaded once. `None` initializes the
            network randomly.
        small_images: Adapt the stem to images of about 32x32: use stride 1 and 3x3 kernels in the first convolution
            (the center of larger pretrained kernels is kept), and remove the max pooling that follows it.

    Returns:
        The network, which returns logits `(B, num_classes)` in training mode as well.

    Raises:
        ValueError: If there is no such network, it has no such weights, or its stem cannot be adapted.
        FileNotFoundError: If the weights cannot be downloaded.

    Example:
        >>> network = torchvision_model("resnet18", num_classes=10, in_channels=1, small_images=True)
        >>> network.conv1, network.maxpool
        (Conv2d(1, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False), Identity())
    """
    check_name("torchvision has no network", name, torchvision.models.list_models(module=torchvision.models))
    network: nn.Module
    if weights is None:
        network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    else:
        network = _pretrained(name, weights, num_classes)
    _drop_auxiliary_heads(network, in_channels)
    adapt_stem(network, name, in_channels, small_images, trained=weights is not None)
    return network


def timm_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    pretrained: bool = False,
    small_images: bool = False,
    img_size: int | None = None,
    patch_size: int | None = None,
) -> nn.Module:
    """Create a timm network; requires `pip install 'lightning-kd[timm]'`.

    Args:
        name: Name of the network, from `timm.list_models()`, such as `resnet18`, or from `timm.list_pretrained()`, such
            as `resnet18.a1_in1k`.
        num_classes: Number of classes. If pretrained weights have another number, the last layer is replaced. With 0,
            the network has no classifier and returns its pooled feature.
        in_channels: Number of input channels; timm adapts pretrained weights to it.
        pretrained: Whether to load pretrained weights, which are downloaded once.
        small_images: Adapt the stem to images of about 32x32: use stride 1 and 3x3 kernels in the first convolution
            (the center of larger pretrained kernels is kept), and remove the max pooling that follows it.
        img_size: Height and width of the images, for transformers with a fixed image size. `None` uses their default.
        patch_size: Height and width of a transformer's patches. `None` uses the default.

    Returns:
        The network. A network with a distillation head returns the mean of the logits of both heads, in training mode
        as well.

    Raises:
        ValueError: If timm is not installed, there is no such network, it has no pretrained weights, its stem cannot be
            adapted, or it does not support `img_size` or `patch_size`.
        FileNotFoundError: If the weights cannot be downloaded.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            "timm_model requires timm, which is not installed; run pip install 'lightning-kd[timm]'"
        ) from error
    if ":" not in name:  # names such as hf-hub:USER/NETWORK and local-dir:FOLDER are not in timm's lists
        family = name.split(".")[0]
        check_name("timm has no network", family, timm.list_models())
        if pretrained or name != family:
            trained = timm.list_pretrained(f"{family}.*")
            check_name("timm has no pretrained weights", name, [family, *trained] if trained else [])
    sizes: dict[str, Any] = {
        key: size for key, size in (("img_size", img_size), ("patch_size", patch_size)) if size is not None
    }
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels, **sizes}
    if pretrained and (weights := timm_weights(name)):
        settings["pretrained_cfg_overlay"] = weights
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
    except TypeError as error:
        if not sizes:
            raise
        raise ValueError(
            f"timm's {name} does not support {' and '.join(sizes)} ({first_line(error)}); omit this setting, or use a "
            "transformer such as deit_tiny_patch16_224"
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"the pretrained weights of timm's {name} are not cached and could not be downloaded "
            f"({first_line(error)}); copy the Hugging Face cache folder ($HF_HOME, by default "
            "~/.cache/huggingface) from a machine that has them, or set pretrained to false"
        ) from error
    if small_images:
        adapt_stem(network, name, in_channels, small_images, trained=pretrained)
    return network


def check_name(lacking: str, name: str, known: Sequence[str]) -> None:
    """Check that a name is known.

    Args:
        lacking: Beginning of the error message.
        name: The name.
        known: All known names.

    Raises:
        ValueError: If the name is unknown; the message lists similar names.
    """
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        raise ValueError(f"{lacking} {name!r}; closest matches: {', '.join(nearest) or 'none'}")


def _pretrained(name: str, weights: str, num_classes: int) -> nn.Module:
    entry = find_weights(name, weights)
    network = with_weights(name, entry, lambda: torchvision.models.get_model(name, weights=entry))
    if num_classes != len(entry.meta["categories"]):
        _replace_classifier(network, num_classes)
    return network


def find_weights(name: str, weights: str) -> Any:
    """Find pretrained weights of a torchvision network.

    Args:
        name: Name of the network.
        weights: Name of the weights, such as `DEFAULT`.

    Returns:
        Member of the network's weights enum.

    Raises:
        ValueError: If the network has no such weights.
    """
    available = torchvision.models.get_model_weights(name)
    entry = weights.split(".")[-1]  # torchvision also writes ResNet18_Weights.IMAGENET1K_V1
    check_name(f"torchvision's {name} has no weights", entry, list(available.__members__))
    return available[entry]


def with_weights(name: str, entry: Any, create: Callable[[], nn.Module], setting: str = "weights") -> nn.Module:
    """Create a network with pretrained weights, which are downloaded unless they are cached.

    Args:
        name: Name of the network that the weights belong to.
        entry: Its weights, as returned by `find_weights`.
        create: Function that creates the network.
        setting: Name of the setting in the error message.

    Returns:
        The network.

    Raises:
        FileNotFoundError: If the weights are not cached and cannot be downloaded.
    """
    file = hub_file(entry.url)
    try:
        if not file.is_file() and (reason := unreachable(entry.url)):
            raise OSError(reason)
        return create()
    except OSError as error:
        raise FileNotFoundError(
            f"the weights {entry.name} of torchvision's {name} are not cached and could not be downloaded "
            f"({first_line(error)}); download {entry.url} on another machine and copy it to {file}, or set "
            f"{setting} to null"
        ) from error


def _replace_classifier(network: nn.Module, num_classes: int) -> None:
    modules = network.named_modules()
    path, last = [(path, layer) for path, layer in modules if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    if isinstance(last, nn.Conv2d):  # SqueezeNet
        network.set_submodule(path, nn.Conv2d(last.in_channels, num_classes, kernel_size=1))
    else:
        network.set_submodule(path, nn.Linear(last.in_features, num_classes))


def _drop_auxiliary_heads(network: nn.Module, in_channels: int) -> None:
    """Remove the auxiliary heads of GoogLeNet and Inception v3, which return a tuple in training mode otherwise."""
    changes = {"aux_logits": False, "aux1": None, "aux2": None, "AuxLogits": None}
    if in_channels != 3:
        changes["transform_input"] = False  # it renormalizes the three color channels
    for attribute, value in changes.items():
        if hasattr(network, attribute):
            setattr(network, attribute, value)


def adapt_stem(network: nn.Module, name: str, in_channels: int, small_images: bool, trained: bool) -> None:
    """Adapt the first convolution in place, which preserves its class (such as one with TensorFlow padding).

    Args:
        network: The network.
        name: Its name in error messages.
        in_channels: Number of input channels.
        small_images: Whether to use stride 1, a 3x3 kernel and no max pooling.
        trained: Whether to preserve the weights.

    Raises:
        ValueError: If the stem cannot be adapted.
    """
    convolutions = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"{name} has no convolution that small_images could adapt; omit small_images")
    path, stem = convolutions[0]
    kernels = stem.weight.detach()
    if in_channels != stem.in_channels:
        kernels = (kernels.sum(dim=1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)
    if small_images and stem.stride != (1, 1):
        if stem.kernel_size == stem.stride:
            size = "x".join(map(str, stem.stride))
            raise ValueError(
                f"{name} splits images into patches of {size} pixels and has no stem that small_images could adapt; "
                "omit small_images and resize the images to the input size of the network, or use a convolutional "
                "network such as resnet18"
            )
        kernels = _middle(kernels)
        stem.kernel_size, stem.stride, stem.padding = (3, 3), (1, 1), (1, 1)
        _remove_stem_pool(network, path)
    if kernels.shape != stem.weight.shape:
        stem.in_channels = in_channels
        stem.weight = nn.Parameter(kernels.clone())
        if not trained:
            stem.reset_parameters()
    if small_images:
        _check_runs(network, name, stem)


def _middle(kernels: torch.Tensor) -> torch.Tensor:
    top, left = (kernels.shape[2] - 3) // 2, (kernels.shape[3] - 3) // 2
    return kernels[:, :, top : top + 3, left : left + 3]


def _remove_stem_pool(network: nn.Module, stem_path: str) -> None:
    """Replace the max pooling after the stem by an identity, if it precedes the next strided convolution."""
    paths = list(dict(network.named_modules()))
    for path in paths[paths.index(stem_path) + 1 :]:
        layer = network.get_submodule(path)
        if isinstance(layer, nn.MaxPool2d):
            network.set_submodule(path, nn.Identity())
            return
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
            return


def _check_runs(network: nn.Module, name: str, stem: nn.Conv2d) -> None:
    """Raise an error before training if the stem has branches or the network requires a fixed image size."""
    try:
        with torch.no_grad(), evaluating(network):
            network(stem.weight.new_zeros(1, stem.in_channels, 32, 32))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{name} does not accept images of 32x32 even with an adapted stem ({first_line(error)}); omit "
            "small_images and resize the images, or use a network with a plain stem such as resnet18"
        ) from error
