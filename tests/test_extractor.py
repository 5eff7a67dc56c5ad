from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lkd import FeatureExtractor
from lkd.models import resnet8

LAYERS = ["layer1.0.bn1", "layer1.0.bn2", "layer1.0.relu", "layer1", "layer2:input", "avgpool"]


@pytest.fixture
def network() -> nn.Module:
    """Return a network whose BatchNorms are followed by in-place additions and in-place ReLUs."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10).eval()


def _without_hooks(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Compute the same layers without hooks."""
    block = network.layer1[0]
    stem = network.maxpool(network.relu(network.bn1(network.conv1(image))))
    bn1 = block.bn1(block.conv1(stem))
    bn2 = block.bn2(block.conv2(bn1.relu()))
    first = (bn2 + stem).relu()
    layer1 = network.layer1[1](first.clone())
    pooled = network.avgpool(network.layer4(network.layer3(network.layer2(layer1.clone()))))
    return dict(zip(LAYERS, (bn1, bn2, first, layer1, layer1, pooled), strict=True))


@pytest.mark.parametrize("probed", [False, True])
def test_features_are_the_outputs_of_the_layers(network: nn.Module, probed: bool) -> None:
    image = torch.randn(2, 3, 32, 32)
    extractor = FeatureExtractor(network, LAYERS)
    if probed:
        extractor.probe(torch.zeros(1, 3, 32, 32))
    outputs = extractor(image)
    expected = _without_hooks(network, image)
    assert list(outputs.features) == LAYERS
    for name in LAYERS:
        torch.testing.assert_close(outputs.features[name], expected[name], msg=name)
    torch.testing.assert_close(outputs.logits, network(image))


def test_probe_keeps_modes_and_statistics(network: nn.Module) -> None:
    network.train()
    network.layer2.eval()
    before = copy.deepcopy(network.state_dict())
    FeatureExtractor(network, ["layer1"]).probe(torch.randn(1, 3, 32, 32))
    assert network.training
    assert network.layer3.training
    assert not network.layer2.training
    assert not network.layer2[0].bn1.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradient_flows_through_features(network: nn.Module) -> None:
    outputs = FeatureExtractor(network, ["layer1"])(torch.randn(2, 3, 32, 32))
    outputs.features["layer1"].square().sum().backward()
    assert network.conv1.weight.grad.abs().sum() > 0
    assert network.layer2[0].conv1.weight.grad is None


def test_in_place_dropout_after_a_tapped_layer() -> None:
    network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5, inplace=True), nn.Linear(64, 2))
    extractor = FeatureExtractor(network, ["0"])
    extractor.probe(torch.zeros(1, 4))
    image = torch.randn(3, 4)
    network.train()
    torch.testing.assert_close(extractor(image).features["0"], network[0](image))


def test_adds_nothing_to_the_state_dict() -> None:
    network = resnet8(num_classes=10)
    keys = list(network.state_dict())
    FeatureExtractor(network, ["layer1"])
    assert list(network.state_dict()) == keys


@pytest.mark.parametrize("how", [copy.deepcopy, lambda extractor: pickle.loads(pickle.dumps(extractor))])
def test_copies_use_their_own_network(how) -> None:
    extractor = FeatureExtractor(resnet8(num_classes=10).eval(), ["layer1"])
    other = how(extractor)
    nn.init.zeros_(other.network.conv1.weight)
    image = torch.randn(2, 3, 16, 16)
    assert not torch.equal(extractor(image).features["layer1"], other(image).features["layer1"])
    torch.testing.assert_close(other(image).logits, other.network(image))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_as_one_graph(network: nn.Module, in_place: bool) -> None:
    extractor = FeatureExtractor(network, LAYERS)
    image = torch.randn(2, 3, 32, 32)
    eager = extractor(image)
    if in_place:
        keys = list(network.state_dict())
        network.compile(fullgraph=True, backend="aot_eager")
        compiled = extractor(image)
        assert list(network.state_dict()) == keys
    else:
        compiled = torch.compile(extractor, fullgraph=True, backend="aot_eager")(image)
    for name in LAYERS:
        torch.testing.assert_close(compiled.features[name], eager.features[name], msg=name)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_names_of_a_compiled_network(network: nn.Module, prefix: str) -> None:
    """`torch.compile(network)` adds a prefix to the names."""
    compiled = torch.compile(network, backend="eager")
    layers = [f"{prefix}layer1", f"{prefix}layer2:input", "@last_stage", "@pooled"]
    image = torch.randn(2, 3, 32, 32)
    extractor = FeatureExtractor(compiled, layers)
    assert extractor.layers == (*layers[:2], "layer4", "fc:input")
    assert extractor.probe(image).network is network
    expected = _without_hooks(network, image)
    features = extractor(image).features
    for name in layers[:2]:
        torch.testing.assert_close(features[name], expected[name.removeprefix("_orig_mod.")])
    with pytest.raises(ValueError, match="ResNet has no layer 'layer9'; nearest names: layer"):
        FeatureExtractor(compiled, ["layer9"])


class _Scaled(nn.Module):
    def forward(self, input: Tensor, factor: Tensor) -> Tensor:
        return factor * input


class _ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.scaled = _Scaled()

    def forward(self, input: Tensor) -> Tensor:
        return self.scaled(self.fc(input=input), factor=torch.ones(1))


def test_input_as_keyword_argument() -> None:
    image = torch.randn(3, 4)
    for extractor in (FeatureExtractor(_ByKeyword(), ["fc:input"]), FeatureExtractor(_ByKeyword(), ["@pooled"])):
        assert torch.equal(extractor(image).features["fc:input"], image)


def test_input_of_a_layer_with_more_arguments() -> None:
    extractor, image = FeatureExtractor(_ByKeyword(), ["scaled:input"]), torch.randn(3, 4)
    assert torch.equal(extractor(image).features["scaled:input"], extractor.network.fc(image))


def test_unknown_layer() -> None:
    with pytest.raises(ValueError, match=r"CIFARResNet has no layer 'layre2'; nearest names: layer2"):
        FeatureExtractor(resnet8(num_classes=10), ["layre2"])


def test_layer_that_is_not_reached() -> None:
    network = nn.Sequential(nn.Linear(4, 2))
    network.spare = nn.Linear(1, 1)
    network.forward = lambda input: network[0](input)
    with pytest.raises(ValueError, match=r"did not reach the layers \['spare'\]"):
        FeatureExtractor(network, ["spare"])(torch.zeros(1, 4))
    extractor = FeatureExtractor(network, ["0"])
    extractor(torch.zeros(1, 4))
    network.forward = lambda input: input  # the previous batch reached the layer, but its feature must not be returned
    with pytest.raises(ValueError, match=r"did not reach the layers \['0'\]"):
        extractor(torch.zeros(1, 4))


class _Output(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, input: Tensor) -> object:
        if self.kind is dict:
            return {"logits": input}
        return type("ModelOutput", (), {"logits": input})() if self.kind is object else [input]


def test_logits_of_other_networks() -> None:
    for kind in (dict, object):
        assert torch.equal(FeatureExtractor(_Output(kind))(torch.ones(2, 3)).logits, torch.ones(2, 3))
    with pytest.raises(TypeError, match="must return logits"):
        FeatureExtractor(_Output(list))(torch.ones(2, 3))
