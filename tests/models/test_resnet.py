"""Features of the CIFAR ResNets that test_benchmark.py does not cover: shortcut A, small images, errors, and YAML."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lkd import models


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
        ({"num_filters": (16, 32, 64)}, r"must have 4 elements .* got \[16, 32, 64\]"),
        ({"num_classes": 0}, r"must be at least 1, got \[4, 4, 8, 16\], 0 and 3"),
        ({"shortcut": "C"}, r"'A' .* or 'B' .* got 'C'"),
        ({"num_filters": (16, 8, 8, 8), "shortcut": "A"}, r"cannot reduce the number of channels, .* 16 to 8; use"),
    ],
)
def test_invalid_arguments(changes: dict[str, object], message: str) -> None:
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
