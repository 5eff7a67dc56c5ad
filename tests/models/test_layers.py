"""Naming the layers that can be tapped."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lkd import FeatureTaps
from lkd.models import layer_names, resnet8, torchvision_model, vgg8


class Mixed(nn.Module):
    """Takes a dictionary; one layer returns a tuple, one is called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.attention, self.never = nn.Linear(3, 4), nn.MultiheadAttention(4, 2), nn.Linear(1, 1)
        self.twice = nn.Softmax(dim=-1)

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        tokens, weights = self.attention(*3 * [self.grow(input["tokens"])])
        self.twice(weights)
        return self.twice(tokens)


@pytest.mark.parametrize("example", [None, torch.zeros(2, 1, 16, 16)])
def test_shapes_are_what_taps_return(example: Tensor | None) -> None:
    network = resnet8(num_classes=10, in_channels=1)
    found = layer_names(network, example)
    probe = FeatureTaps(network, list(found)).probe(torch.zeros(1, 1, 32, 32) if example is None else example)
    assert found == {name: tuple(feature.shape) for name, feature in probe.outputs.features.items()}
    assert set(found) == {name for name, _ in network.named_modules() if name}
    assert found["layer2"] == ((1, 32, 16, 16) if example is None else (2, 32, 8, 8))


def test_the_network_stays_as_it_was() -> None:
    network = torchvision_model("resnet18", num_classes=10).train()
    network.layer2.eval()
    network.layer2[0].bn1.train()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    assert layer_names(network, torch.rand(1, 3, 32, 32))["layer4"] == (1, 512, 1, 1)
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_it_stays_so_after_a_mistake() -> None:
    network = resnet8(num_classes=10)
    with pytest.raises(RuntimeError, match="expected input"):
        layer_names(network, torch.zeros(1, 5, 8, 8))
    assert network.layer1.training
    assert not any(module._forward_hooks for module in network.modules())


def test_layers_without_a_tensor_and_without_a_call() -> None:
    found = layer_names(Mixed(), {"tokens": torch.zeros(5, 1, 3)})
    assert found == {"grow": (5, 1, 4), "twice": (5, 1, 4)}
    assert "pool3" not in layer_names(vgg8(num_classes=10))
    assert layer_names(vgg8(num_classes=10), torch.zeros(1, 3, 64, 64))["pool3"] == (1, 512, 4, 4)


def test_no_convolution() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no convolution that tells which images .*; give an example"):
        layer_names(nn.Sequential(nn.Linear(2, 2)))
