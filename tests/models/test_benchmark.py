"""Networks of the CIFAR-100 benchmark agree with the original code, whose outputs are in reference/models.json.

`LKD_FIXTURES=<folder>` reads another folder's models.json, which may contain values for more networks.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lkd import FeatureExtractor, models
from lkd.models import load_weights

OWN = Path(__file__).parents[1] / "reference" / "models.json"
OTHER = Path(os.environ.get("LKD_FIXTURES", OWN.parent)) / "models.json"
REFERENCE = json.loads((OTHER if OTHER.is_file() else OWN).read_text())["models"]
WITH_NUMBERS = [name for name in REFERENCE if "strong" in REFERENCE[name]]

SHAPES = {
    "resnet8": [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64,)],
    "resnet32x4": [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256,)],
    "wrn_40_1": [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64,)],
    "wrn_40_2": [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8), (128,)],
    "vgg13": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512,)],
    "mobilenetv2": [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280,)],
    "shufflev1": [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4), (960,)],
    "shufflev2": [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4), (1024,)],
    "resnet18": [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512,)],
    "resnet50": [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4), (2048,)],
}
ALIKE = {"wrn_16_1": "wrn_40_1", "wrn_16_2": "wrn_40_2", "resnet8x4": "resnet32x4"}


def shapes(name: str) -> list[tuple[int, ...]]:
    family = "vgg13" if name.startswith("vgg") else "resnet8"
    return SHAPES.get(ALIKE.get(name, name), SHAPES[family])


def layers(network: nn.Module) -> tuple[list[str], list[str]]:
    """Return the layers that the benchmark calls `feats` and `preact_feats`."""
    if isinstance(network, models.WideResNet):
        return ["conv1", "block1", "block2", "block3"], ["conv1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
    if isinstance(network, models.VGG):
        return [f"relu{stage}" for stage in range(5)], ["relu0", "block1", "block2", "block3", "block4"]
    if isinstance(network, models.MobileNetV2):
        return ["conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"], []
    stages = [name for name, _ in network.named_children() if name.startswith("layer")]
    sums = []
    for stage in stages:
        last = len(network.get_submodule(stage)) - 1
        relus = [name for name, _ in network.get_submodule(f"{stage}.{last}").named_children() if "relu" in name]
        sums.append(f"{stage}.{last}.{relus[-1]}:input")
    return ["relu", *stages], ["relu", *sums]


def on_meta_device(name: str, **settings: int) -> nn.Module:
    with torch.device("meta"):
        return getattr(models, name.lower())(**{"num_classes": 100, **settings})


@torch.no_grad()
def filled(name: str) -> nn.Module:
    """Return the network in float64 with the weights `strong`, as described in models.json."""
    network = on_meta_device(name).double().to_empty(device="cpu").eval()
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for k, (name, tensor) in enumerate(network.state_dict().items()):
        i = torch.arange(tensor.numel(), dtype=torch.int64)
        v = 2 * (((i * 1103515245 + 12345 * (k + 1)) % 2**31).double() / 2**31) - 1
        layer, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            v = torch.zeros(1)
        elif tensor.ndim >= 2:
            v = (6 / tensor[0].numel()) ** 0.5 * v
        elif kind == "running_var" or (layer in norms and kind == "weight"):
            v = 1 + 0.3 * v
        else:
            v = 0.1 * v
        tensor.copy_(v.reshape(tensor.shape))
    return network


def reference_image(size: int = 32) -> Tensor:
    i = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return torch.sin(0.013 * i + 0.5 * torch.cos(0.0007 * i)).reshape(2, 3, size, size)


def assert_relatively_equal(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_all_networks_exist() -> None:
    families = ("resnet", "wrn", "vgg", "mobilenet", "shuffle")
    assert {name for name in models.__all__ if name.startswith(families)} == {name.lower() for name in REFERENCE}
    if OTHER == OWN:
        numbers = ["resnet8", "resnet20", "resnet56", "resnet8x4", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1"]
        assert numbers == WITH_NUMBERS


@pytest.mark.parametrize("name", REFERENCE)
def test_names_shapes_and_order(name: str) -> None:
    network = on_meta_device(name)
    given = REFERENCE[name]["state_dict"]
    expected = given.items() if isinstance(given, dict) else [entry[:2] for entry in given]
    state = network.state_dict().items()
    assert [(key, list(tensor.shape)) for key, tensor in state] == [(key, shape) for key, shape in expected]
    assert sum(parameter.numel() for parameter in network.parameters()) == REFERENCE[name]["param_count"]


@pytest.mark.parametrize("name", REFERENCE)
def test_published_checkpoints_load(name: str, tmp_path: Path) -> None:
    """Each tensor has a distinct value, which is loaded into the tensor of that name."""
    state = {
        key: torch.tensor(k).expand(tensor.shape).to(tensor.dtype)
        for k, (key, tensor) in enumerate(on_meta_device(name).state_dict().items())
    }
    file = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(76.4)}, file)
    network = load_weights(on_meta_device(name).to_empty(device="cpu"), file)
    for k, (key, tensor) in enumerate(network.state_dict().items()):
        assert (tensor == k).all(), key


@pytest.mark.parametrize("name", WITH_NUMBERS)
@torch.no_grad()
def test_logits_and_features(name: str) -> None:
    network = filled(name)
    features, sums = layers(network)
    outputs = FeatureExtractor(network, [*features, "flatten", *sums])(reference_image())
    expected = REFERENCE[name]["strong"]
    assert_relatively_equal(outputs.logits, torch.tensor(expected["logits"], dtype=torch.float64))
    numbers = [*expected["feats"], expected["pooled_feat"], *(expected.get("preact_feats") or [])]
    for layer, number in zip([*features, "flatten", *sums], numbers, strict=True):
        feature = outputs.features[layer]
        assert list(feature.shape) == number["shape"], layer
        assert feature.mean().item() == pytest.approx(number["mean"], rel=1e-9, abs=1e-12), layer
        assert feature.flatten()[:8].tolist() == pytest.approx(number["first8"], rel=1e-9, abs=1e-12), layer


@pytest.mark.parametrize("name", REFERENCE)
def test_shapes_of_the_features(name: str) -> None:
    network = on_meta_device(name).eval()
    features, sums = layers(network)
    outputs = FeatureExtractor(network, [*features, "flatten", *sums])(torch.empty(2, 3, 32, 32, device="meta"))
    assert outputs.logits.shape == (2, 100)
    shown = [tuple(outputs.features[layer].shape[1:]) for layer in [*features, "flatten"]]
    assert shown == shapes(name.lower())
    assert not sums or [tuple(outputs.features[layer].shape[1:]) for layer in sums] == shown[:-1]
    assert all(f"`{layer}`" in type(network).__doc__ for layer in [*features, "flatten"])


def torchvisions(name: str) -> tuple[nn.Module, list[str]]:
    """Return torchvision's network with the benchmark's stem and head, and the names of its stages."""
    if name == "ShuffleV2":
        network = torchvision.models.shufflenet_v2_x1_0(num_classes=100)
        network.conv1[0] = nn.Conv2d(3, 24, kernel_size=1, bias=False)
        network.maxpool = nn.Identity()
        return network, ["stage2", "stage3", "stage4"]
    if name == "vgg11":
        network = torchvision.models.vgg11_bn()
        network.features[-1] = nn.Identity()
        network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 100)
        return network, [f"features.{index}" for index in (2, 6, 13, 20, 27)]
    network = models.torchvision_model(name.lower(), num_classes=100, small_images=True)
    return network, ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(("name", "size"), [("ResNet18", 16), ("ResNet50", 16), ("ShuffleV2", 16), ("vgg11", 64)])
@torch.no_grad()
def test_equals_torchvision(name: str, size: int) -> None:
    """Networks without reference values agree with torchvision's, with the same weights in the same order."""
    network = filled(name)
    with torch.device("meta"):
        other, stages = torchvisions(name)
    weights = zip(other.state_dict(), network.state_dict().values(), strict=True)
    other.double().eval().load_state_dict(dict(weights), assign=True)
    features = layers(network)[0][-len(stages) :]
    ours = FeatureExtractor(network, features)(reference_image(size))
    theirs = FeatureExtractor(other, stages)(reference_image(size))
    assert_relatively_equal(ours.logits, theirs.logits)
    for feature, stage in zip(features, stages, strict=True):
        assert_relatively_equal(ours.features[feature], theirs.features[stage])


@torch.no_grad()
def test_shuffled_pre_activations() -> None:
    """ShuffleV2 shuffles channels after the ReLU, so the features are the rectified sums in another order."""
    network = filled("ShuffleV2")
    features, sums = layers(network)
    outputs = FeatureExtractor(network, [*features, *sums])(reference_image(16)).features
    for feature, preact in zip(features[1:], sums[1:], strict=True):
        assert (outputs[preact] < 0).any()
        left, right = outputs[preact].relu().chunk(2, dim=1)
        assert torch.equal(outputs[feature], torch.stack([left, right], dim=2).flatten(1, 2))


@pytest.mark.parametrize("name", ["wrn_16_1", "vgg8", "mobilenetv2", "shufflev1", "shufflev2", "resnet18"])
def test_training_on_gray_images(name: str) -> None:
    torch.manual_seed(0)
    network = getattr(models, name)(num_classes=5, in_channels=1)
    features, sums = layers(network)
    outputs = FeatureExtractor(network, [*features, *sums])(torch.rand(4, 1, 8, 8))
    assert outputs.logits.shape == (4, 5)
    outputs.logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad.any() for parameter in network.parameters() if parameter.ndim > 1)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}  # pre-activations need no second update
    assert not any(module.inplace for module in network.modules() if isinstance(module, nn.ReLU))


SMALL = {
    "ImageNetResNet": {"depth": 18},
    "MobileNetV2": {"width": 0.25},
    "ShuffleNetV1": {"num_filters": (48, 96, 192), "groups": 2},
    "ShuffleNetV2": {"num_filters": (8, 16, 32, 64)},
    "VGG": {"depth": 8, "num_filters": (4, 8, 8, 16, 16)},
    "WideResNet": {"depth": 10, "widen_factor": 1},
}


@pytest.mark.parametrize("name", SMALL)
def test_networks_from_yaml(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    settings = {**SMALL[name], "num_classes": 10, "in_channels": 1}
    config = {"class_path": f"lkd.models.{name}", "init_args": settings}
    network = parser.instantiate(parser.parse_object({"model": config})).model
    assert network.eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ImageNetResNet", {"depth": 20}, r"must be one of 18, 34, 50, 101, 152, got 20; CIFARResNet supports"),
        ("ImageNetResNet", {"num_classes": 0}, r"num_classes must be at least 1, got 0"),
        ("MobileNetV2", {"width": 0.05}, r"width must be at least 0.0625 .*, got 0.05"),
        ("MobileNetV2", {"expansion": 0}, r"expansion must be at least 1, got 0"),
        ("ShuffleNetV1", {"groups": 4}, r"groups of ShuffleNetV1 must be 1, 2 or 3, got 4"),
        (
            "ShuffleNetV1",
            {"num_filters": (48, 96, 100)},
            r"3 increasing multiples of 8 \(4 \* groups\), .* got \[48, 96, 100\]",
        ),
        ("ShuffleNetV1", {"num_filters": (24, 48, 96)}, r"each greater than 24, got \[24, 48, 96\]"),
        ("ShuffleNetV1", {"num_filters": (48, 96)}, r"must be 3 increasing multiples .* got \[48, 96\]"),
        (
            "ShuffleNetV2",
            {"num_filters": (8, 15, 32, 64)},
            r"4 elements, of which the first 3 .* are even, got \[8, 15, 32, 64\]",
        ),
        ("ShuffleNetV2", {"num_filters": (8, 16, 0, 64)}, r"num_filters must be at least 1, got \(8, 16, 0, 64\)"),
        ("VGG", {"depth": 12}, r"depth of VGG must be one of 8, 11, 13, 16, 19, got 12"),
        ("VGG", {"num_filters": (4, 8)}, r"must have 5 elements \(one per stage\), got \[4, 8\]"),
        ("WideResNet", {"depth": 20}, r"must be 6n \+ 4 .* got 20"),
        ("WideResNet", {"widen_factor": 0}, r"widen_factor must be at least 1, got 0"),
        ("WideResNet", {"in_channels": -1}, r"in_channels must be at least 1, got -1"),
    ],
)
def test_invalid_arguments(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(models, name)(**{**SMALL[name], "num_classes": 10, **changes})
