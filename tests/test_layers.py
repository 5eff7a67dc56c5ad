"""Names of the layers that can be tapped."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lkd import FeatureExtractor
from lkd.features.layers import feature_layers, resolve_layers
from lkd.models import UNet, fcos, layer_names, resnet8, timm_model, torchvision_model, vgg8
from tests.models.test_benchmark import REFERENCE, layers, on_meta_device


class Mixed(nn.Module):
    """A network with a dictionary as input, in which one layer returns a tuple, one runs twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.attention, self.never = nn.Linear(3, 4), nn.MultiheadAttention(4, 2), nn.Linear(1, 1)
        self.twice = nn.Softmax(dim=-1)

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        tokens, weights = self.attention(*3 * [self.grow(input["tokens"])])
        self.twice(weights)
        return self.twice(tokens)


@pytest.mark.parametrize("example", [None, torch.zeros(2, 1, 16, 16)])
def test_shapes_equal_those_of_taps(example: Tensor | None) -> None:
    network = resnet8(num_classes=10, in_channels=1)
    found = layer_names(network, example)
    probe = FeatureExtractor(network, list(found)).probe(torch.zeros(1, 1, 32, 32) if example is None else example)
    assert found == {name: tuple(feature.shape) for name, feature in probe.outputs.features.items()}
    assert set(found) == {name for name, _ in network.named_modules() if name}
    assert found["layer2"] == ((1, 32, 16, 16) if example is None else (2, 32, 8, 8))


def test_network_is_not_modified() -> None:
    network = torchvision_model("resnet18", num_classes=10).train()
    network.layer2.eval()
    network.layer2[0].bn1.train()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    assert layer_names(network, torch.rand(1, 3, 32, 32))["layer4"] == (1, 512, 1, 1)
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_network_is_not_modified_by_errors() -> None:
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
    with pytest.raises(
        ValueError, match=r"input channels of Sequential is unknown, .* no convolution; provide an example"
    ):
        layer_names(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", REFERENCE)
def test_groups_equal_the_benchmark(name: str) -> None:
    """Groups such as `@stages` and `@norms` contain the layers that the benchmark's code reads."""
    network = on_meta_device(name)
    features, sums = layers(network)
    assert resolve_layers(network, ["@stem", "@stages", "@pooled"]) == (*features, "flatten")
    assert resolve_layers(network, ["@stage1", "@last_stage"]) == (features[1], features[-1])
    if sums:
        assert resolve_layers(network, ["@preacts"]) == tuple(sums[1:])
    if norms := REFERENCE[name].get("bn_before_relu"):
        assert resolve_layers(network, ["@norms"]) == tuple(norm.partition(":")[0] for norm in norms)
    head, pooling = resolve_layers(network, ["@head", "@map"])
    outputs = FeatureExtractor(network.eval(), [f"{head}:input", pooling])(torch.empty(2, 3, 32, 32, device="meta"))
    pooled, image = outputs.features.values()
    assert pooled.shape == image.shape[:2]


def test_groups_of_other_networks() -> None:
    network = torchvision_model("resnet18", num_classes=10)
    wanted = ("layer1", "layer2.1.bn2", "layer3.1.relu:input", "fc:input", "avgpool:input")
    assert resolve_layers(network, ["@stage1", "@norm2", "@preact3", "@pooled", "@map"]) == wanted
    network = timm_model("resnet10t", num_classes=10)
    assert resolve_layers(network, ["@last_stage", "@pooled", "layer1"]) == ("layer4", "fc:input", "layer1")


RESNET = [f"layer{stage}" for stage in range(1, 5)]
TIMM = {  # name of the first stage, number of stages, and input shapes of the first stage and the pooling
    "resnet18": ("layer1", 4, (64, 56, 56), (512, 7, 7)),
    "resnet50d": ("layer1", 4, (64, 56, 56), (2048, 7, 7)),
    "resnetv2_50": ("stages.0", 4, (64, 56, 56), (2048, 7, 7)),
    "regnety_002": ("s1", 4, (32, 112, 112), (368, 7, 7)),
    "densenet121": ("features.denseblock1", 4, (64, 56, 56), (1024, 7, 7)),
    "mobilenetv3_small_100": ("blocks.0", 4, (16, 112, 112), (576, 7, 7)),
    "ghostnet_100": ("blocks.1", 4, (16, 112, 112), (960, 7, 7)),
    "repvgg_a0": ("stages.0", 4, (48, 112, 112), (1280, 7, 7)),
    "legacy_seresnet18": ("layer1", 4, (64, 56, 56), (512, 7, 7)),
    "efficientnet_b0": ("blocks.0", 5, None, (1280, 7, 7)),
    "convnext_atto": ("stages.0", 4, None, (320, 7, 7)),
    "hrnet_w18_small": (None, 0, None, (2048, 7, 7)),
    "vit_tiny_patch16_224": ("blocks.0", 12, None, None),
    "deit_tiny_distilled_patch16_224": ("blocks.0", 12, None, None),
    "swin_tiny_patch4_window7_224": (None, 0, None, None),
    "volo_d1_224": (None, 0, None, None),
}


@pytest.mark.parametrize("name", TIMM)
def test_groups_of_timm_networks(name: str) -> None:
    """timm's first feature is that of the stem in some families, and that of the first stage in others."""
    with torch.device("meta"):
        network = timm_model(name, num_classes=10).eval()
    first, number, stem, pooling = TIMM[name]
    layers = feature_layers(network)
    assert (layers.stages[:1], len(layers.stages)) == (((first,) if first else ()), number)
    names = [layer for layer in (*layers.stages, layers.stem, layers.map) if layer]
    features = FeatureExtractor(network, names)(torch.empty(2, 3, 224, 224, device="meta")).features
    for layer, shape in ((layers.stem, stem), (layers.map, pooling)):
        assert (tuple(features[layer].shape[1:]) if layer else None) == shape
    sizes = [features[layer].shape[2] for layer in layers.stages]
    tokens = name.startswith(("vit", "deit"))
    assert len(set(sizes)) == (1 if tokens else number)  # each stage halves its map
    assert {features[layer].dim() for layer in layers.stages} <= ({3} if tokens else {4})


@pytest.mark.parametrize(
    ("name", "act", "norm"),
    [
        ("resnet18", "act2", "bn2"),
        ("resnet50d", "act3", "bn3"),
        ("seresnet50", "act3", None),
        ("res2net50_26w_4s", "relu", "bn3"),
        ("skresnet18", None, None),
    ],
)
def test_sums_of_timm_resnets(name: str, act: str | None, norm: str | None) -> None:
    """The layers correspond to torchvision's; squeeze and excitation comes between the BatchNorm and the sum."""
    with torch.device("meta"):
        network = timm_model(name, num_classes=10).eval()
    layers = feature_layers(network)
    last = [f"{stage}.{len(network.get_submodule(stage)) - 1}" for stage in RESNET]
    assert layers.preacts == tuple(f"{block}.{act}:input" for block in last if act)
    assert layers.norms == tuple(f"{block}.{norm}" for block in last if norm)


def test_activation_after_the_sum() -> None:
    network = timm_model("resnet10t", num_classes=10).eval()
    layers = ["@preact4", "@stage4"]
    before, after = FeatureExtractor(network, layers)(torch.randn(2, 3, 64, 64)).features.values()
    assert before.min() < 0
    torch.testing.assert_close(after, before.relu())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vgg11"])
def test_map_of_torchvision_networks(name: str) -> None:
    """VGG has no group `@map`, because its `avgpool` outputs 7x7 pixels."""
    with torch.device("meta"):
        network = torchvision_model(name, num_classes=10).eval()
    assert feature_layers(network).map == ("" if name == "vgg11" else "avgpool:input")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["@stages"], "the layers @stages of Sequential are unknown; specify layer names"),
        (["@stage9"], "the layers @stage9 of Sequential are unknown"),
        (["@stage0"], "the layers @stage0 of Sequential are unknown"),
        (["@tail"], "unknown group of layers '@tail'; available: @stem, @stages"),
    ],
)
def test_unknown_groups(names: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve_layers(nn.Sequential(nn.Linear(2, 2)), names)


def test_numbered_groups_of_detectors_and_decoders() -> None:
    """Every group that `lkd layers` lists can be used."""
    for network in (fcos(num_classes=3, filters=(4, 8)), UNet((4, 8, 16), num_classes=3)):
        layers = feature_layers(network)
        for field in ("stages", "decoder", "pyramid", "class_maps", "box_maps"):
            names = [f"@{field.removesuffix('s')}{number + 1}" for number in range(len(getattr(layers, field)))]
            assert resolve_layers(network, names) == getattr(layers, field)
