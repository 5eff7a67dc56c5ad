"""The CIFAR ResNets against the benchmark's original code, whose answers are in reference/models.json."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lkd import models

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "models.json").read_text())["models"]
NAMES = [name for name in REFERENCE if hasattr(models, name)]
WITH_NUMBERS = [name for name in NAMES if "strong" in REFERENCE[name]]


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """The fill `strong`, as models.json describes it."""
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


def reference_image() -> torch.Tensor:
    i = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    return torch.sin(0.013 * i + 0.5 * torch.cos(0.0007 * i)).reshape(2, 3, 32, 32)


def test_all_resnets_have_a_reference() -> None:
    factories = {name for name in models.__all__ if name.startswith("resnet")}
    assert factories == set(NAMES)
    assert set(WITH_NUMBERS) == {"resnet8", "resnet20", "resnet56", "resnet8x4"}


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_order(name: str) -> None:
    network = getattr(models, name)(num_classes=100)
    expected = [(key, tuple(shape)) for key, shape in REFERENCE[name]["state_dict"].items()]
    assert [(key, tuple(tensor.shape)) for key, tensor in network.state_dict().items()] == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == REFERENCE[name]["param_count"]


@pytest.mark.parametrize("name", WITH_NUMBERS)
@torch.no_grad()
def test_logits_and_features(name: str) -> None:
    network = getattr(models, name)(num_classes=100).double().eval()
    fill(network)
    sums = [f"layer{stage}.{len(network.layer1) - 1}.relu2" for stage in (1, 2, 3)]
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def record(layer: str, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs[layer], outputs[layer] = args[0], output

    for layer in ("relu", "layer1", "layer2", "layer3", "flatten", *sums):
        network.get_submodule(layer).register_forward_hook(partial(record, layer))
    logits = network(reference_image())

    expected = REFERENCE[name]["strong"]
    reference = torch.tensor(expected["logits"], dtype=torch.float64)
    assert (logits - reference).abs().max() <= 1e-9 * reference.abs().max()
    # Read only now: an operation in place would have changed the sums by its ReLU.
    seen = [outputs[layer] for layer in ("relu", "layer1", "layer2", "layer3", "flatten")]
    seen += [inputs[layer] for layer in sums]
    for feature, numbers in zip(
        seen, [*expected["feats"], expected["pooled_feat"], *expected["preact_feats"][1:]], strict=True
    ):
        assert list(feature.shape) == numbers["shape"]
        assert feature.mean().item() == pytest.approx(numbers["mean"], rel=1e-9)
        assert feature.flatten()[:8].tolist() == pytest.approx(numbers["first8"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_shortcut_a_has_no_parameters(depth: int, count: int) -> None:
    network = getattr(models, f"resnet{depth}")(num_classes=10, shortcut="A")
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert not [key for key in network.state_dict() if "downsample" in key]


@pytest.mark.parametrize(("stage", "stride", "zeros_before"), [(1, 1, 2), (2, 2, 0), (3, 2, 4)])
def test_shortcut_a_subsamples_and_pads_both_sides(stage: int, stride: int, zeros_before: int) -> None:
    network = models.CIFARResNet(8, (3, 8, 8, 16), num_classes=10, shortcut="A")
    block = network.get_submodule(f"layer{stage}.0")
    feature = torch.rand(2, block.conv1.in_channels, 7, 6)
    expected = torch.zeros_like(block.conv1(feature))
    for channel in range(feature.shape[1]):
        for row in range(expected.shape[2]):
            for column in range(expected.shape[3]):
                value = feature[:, channel, row * stride, column * stride]
                expected[:, channel + zeros_before, row, column] = value
    torch.testing.assert_close(block.downsample(feature), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_small_gray_images_and_gradients(shortcut: str) -> None:
    network = models.CIFARResNet(8, (4, 4, 8, 16), num_classes=10, in_channels=1, shortcut=shortcut)
    logits = network(torch.rand(4, 1, 8, 8))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert not any(module.inplace for module in network.modules() if isinstance(module, nn.ReLU))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 21}, r"must be 6n \+ 2 .* got 21"),
        ({"depth": 2}, r"must be 6n \+ 2 .* got 2"),
        ({"num_filters": (16, 32, 64)}, r"must be 4 numbers .* got \[16, 32, 64\]"),
        ({"num_classes": 0}, r"must be at least 1, got \[4, 4, 8, 16\], 0 and 3"),
        ({"shortcut": "C"}, r"'A' .* or 'B' .* got 'C'"),
        ({"num_filters": (16, 8, 8, 8), "shortcut": "A"}, r"can only add channels, .* 16 to 8; let"),
    ],
)
def test_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.CIFARResNet(**{"depth": 8, "num_filters": (4, 4, 8, 16), "num_classes": 10, **changes})


@pytest.mark.parametrize(
    "config",
    [
        {"class_path": "lkd.models.resnet20", "init_args": {"num_classes": 10, "shortcut": "A"}},
        {
            "class_path": "lkd.models.CIFARResNet",
            "init_args": {"depth": 8, "num_filters": [4, 4, 8, 16], "num_classes": 10, "in_channels": 1},
        },
        {
            "class_path": "lkd.models.torchvision_model",
            "init_args": {"name": "resnet18", "num_classes": 10, "small_images": True},
        },
    ],
)
def test_networks_from_yaml(config: dict[str, object]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    network = parser.instantiate(parser.parse_object({"model": config})).model
    in_channels = config["init_args"].get("in_channels", 3)
    assert network.eval()(torch.zeros(1, in_channels, 8, 8)).shape == (1, 10)
