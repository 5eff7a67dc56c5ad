"""Segmentation networks of torchvision and segmentation_models_pytorch: groups of layers, weights and errors."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision
from torch import nn

from lkd import FeatureExtractor
from lkd.models import smp_model, torchvision_segmentation
from lkd.tasks import SemanticSegmentation
from tests.models.test_factories import refused

TASK = SemanticSegmentation(5)
DEEPLAB = "deeplabv3_mobilenet_v3_large"
RESNET = [(256, 16, 32), (512, 8, 16), (1024, 8, 16), (2048, 8, 16)]
MOBILENET = [(24, 16, 32), (40, 8, 16), (112, 4, 8), (960, 4, 8)]


def shapes(network: nn.Module, *groups: str) -> list[tuple[int, ...]]:
    """Return the shapes of the layers of the groups, for two images of 64x128 pixels with two channels."""
    outputs = FeatureExtractor(network.eval(), groups, TASK.logits)(torch.zeros(2, 2, 64, 128))
    return [tuple(feature.shape[1:]) for feature in outputs.features.values()]


@pytest.mark.parametrize(
    ("name", "stages", "decoder", "last"),
    [
        ("fcn_resnet50", RESNET, (), (512, 8, 16)),
        (
            "deeplabv3_resnet101",
            RESNET,
            (256, 8, 16),
            (256, 8, 16),
        ),
        (DEEPLAB, MOBILENET, (256, 4, 8), (256, 4, 8)),
        ("lraspp_mobilenet_v3_large", MOBILENET, (), (128, 8, 16)),
    ],
)
def test_groups_of_torchvision(name: str, stages: list, decoder: tuple, last: tuple) -> None:
    with torch.device("meta"):  # shapes only, without values
        network = torchvision_segmentation(name, num_classes=5, in_channels=2)
        assert shapes(network, "@stages") == stages
        assert shapes(network, "@map") == [last]
        if decoder:
            assert shapes(network, "@decoder") == [decoder]
        if not name.startswith("lraspp"):
            assert shapes(network, "@head") == [(5, *last[1:])]


def test_auxiliary_head() -> None:
    with torch.device("meta"):
        image = torch.zeros(2, 3, 64, 64)
        assert list(torchvision_segmentation(DEEPLAB, num_classes=5, aux_loss=True)(image)) == ["out", "aux"]
        assert list(torchvision_segmentation(DEEPLAB, num_classes=5)(image)) == ["out"]
        with pytest.raises(ValueError, match=r"lraspp_mobilenet_v3_large supports no auxiliary head; set aux_loss"):
            torchvision_segmentation("lraspp_mobilenet_v3_large", num_classes=5, aux_loss=True)


def _cached(name: str, weights: str, monkeypatch: pytest.MonkeyPatch, **settings: object) -> nn.Module:
    """Create a network from random weights in the download folder of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(Path.cwd()))
    network = torchvision.models.get_model(name, weights=None, **settings)
    url = torchvision.models.get_model_weights(name)[weights].url
    folder = Path("hub/checkpoints")
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / url.split("/")[-1])
    return network.eval()


@torch.no_grad()
def test_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = _cached(DEEPLAB, "DEFAULT", monkeypatch, weights_backbone=None, aux_loss=True)
    gray = torch.rand(1, 1, 64, 64)
    same = torchvision_segmentation(DEEPLAB, num_classes=21, in_channels=2, weights="DEFAULT").eval()
    color, two = (gray.expand(-1, channels, -1, -1) for channels in (3, 2))
    assert set(same(two)) == {"out"}
    torch.testing.assert_close(same(two)["out"], trained(color)["out"])
    other = torchvision_segmentation(DEEPLAB, num_classes=5, weights="DEFAULT", aux_loss=True).eval()
    assert {name: logits.shape[1] for name, logits in other(color).items()} == {"out": 5, "aux": 5}
    kept, found = trained.state_dict(), other.state_dict()
    changed = {name.rpartition(".")[0] for name in kept if not torch.equal(kept[name], found[name])}
    assert changed == {"classifier.4", "aux_classifier.4"}


def test_pretrained_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = _cached("mobilenet_v3_large", "IMAGENET1K_V1", monkeypatch)
    network = torchvision_segmentation("lraspp_mobilenet_v3_large", num_classes=5, weights_backbone="IMAGENET1K_V1")
    assert torch.equal(network.backbone["13"].block[0][0].weight, trained.features[13].block[0][0].weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "DEFAULT"}, r"deeplabv3_mobilenet_v3_large are not cached .*refused\); .* or set weights to null"),
        ({"weights_backbone": "DEFAULT"}, r"torchvision's mobilenet_v3_large are .* or set weights_backbone to null"),
    ],
)
def test_offline(settings: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(FileNotFoundError, match=message):
        torchvision_segmentation(DEEPLAB, num_classes=5, **settings)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no segmentation network 'fcn_resnet18'; closest matches: fcn_resnet101"):
        torchvision_segmentation("fcn_resnet18", num_classes=5)
    with pytest.raises(ValueError, match=r"fcn_resnet50 has no weights 'IMAGENET1K_V1'; closest matches: COCO_WITH"):
        torchvision_segmentation("fcn_resnet50", num_classes=5, weights="IMAGENET1K_V1")


def test_smp_unknown_names() -> None:
    assert type(smp_model("FPN", "resnet18", num_classes=5)).__name__ == "FPN"  # in upper or lower case
    for settings, message in (
        ({"architecture": "unett"}, "no architecture 'unett'; closest matches: unet"),
        ({"encoder": "resnet81"}, "no encoder 'resnet81'; closest matches: resnet18"),
        ({"encoder_weights": "imagnet"}, "no weights 'imagnet'; closest matches: imagenet"),
    ):
        with pytest.raises(ValueError, match=message):
            smp_model(**{"architecture": "unet", "encoder": "resnet18", "num_classes": 5, **settings})


@pytest.mark.parametrize(
    ("architecture", "encoder", "stages", "decoder", "last"),
    [
        ("unet", "resnet18", [(64, 16, 32), (128, 8, 16), (256, 4, 8), (512, 2, 4)], 5, (16, 64, 128)),
        ("fpn", "tu-test_resnet", [(32, 16, 32), (48, 8, 16), (192, 4, 8), (96, 2, 4)], 1, (128, 16, 32)),
    ],
)
@torch.no_grad()
def test_groups_of_smp(architecture: str, encoder: str, stages: list, decoder: int, last: tuple) -> None:
    network = smp_model(architecture, encoder, num_classes=5, in_channels=2)
    assert network(torch.zeros(2, 2, 64, 128)).shape[:2] == (2, 5)
    assert shapes(network, "@stages") == stages
    assert len(shapes(network, "@decoder")) == decoder
    assert shapes(network, "@map", "@head") == [last, (5, *last[1:])]


def test_smp_encoders_without_layers_for_their_maps() -> None:
    network = smp_model("segformer", "mit_b0", num_classes=5)
    with pytest.raises(ValueError, match="the layers @stages of Segformer are unknown"):
        FeatureExtractor(network, ["@stages"])


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_smp_offline(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(FileNotFoundError, match=r"resnet18 are not .*refused\); run `hf .*or set encoder_weights"):
        smp_model("unet", encoder, num_classes=5, encoder_weights="imagenet")


def test_without_smp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match=r"which is not installed; run pip install 'lightning-kd\[segmentation\]'"):
        smp_model("unet", "resnet18", num_classes=5)
