"""Networks of torchvision and timm: classes, channels, stems for small images, weights, and errors."""

import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from lkd.models import timm_model, torchvision_model
from lkd.models.downloads import unreachable

CONVOLUTIONAL = [
    "alexnet",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
]


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_small_images_keep_their_size_in_the_stem(name: str) -> None:
    sizes = []
    with torch.device("meta"):  # shapes without values, which is fast
        network = torchvision_model(name, num_classes=7, in_channels=2, small_images=True)
        convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        convolutions[1].register_forward_pre_hook(lambda layer, args: sizes.append(tuple(args[0].shape[2:])))
        assert network.train()(torch.rand(2, 2, 32, 32)).shape == (2, 7)  # not a tuple with auxiliary logits
    assert sizes == [(32, 32)]


def test_resnet_for_small_images_equals_the_benchmark() -> None:
    """ResNet-18 for CIFAR has a 3x3 stem and no pooling, so the last stage outputs 4x4 maps."""
    network = torchvision_model("resnet18", num_classes=100, small_images=True)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_220_132  # as in models.json
    seen = []
    network.layer4.register_forward_hook(lambda layer, args, output: seen.append(tuple(output.shape)))
    network(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 512, 4, 4)]
    assert network.conv1.weight.std() > 0.05  # the smaller kernel is initialized


def test_stem_without_stride_is_unchanged() -> None:
    with torch.device("meta"):
        stem = torchvision_model("vgg11_bn", num_classes=2, small_images=True).features
    assert [type(layer) for layer in stem[:4]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "convnext_tiny"])
def test_patches_cannot_be_adapted(name: str) -> None:
    message = rf"{name} splits images into patches of .* omit small_images"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        torchvision_model(name, num_classes=2, small_images=True)


def store_download(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Store random weights as a download of torch.hub, and return the network with these weights."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    network = torchvision.models.get_model(name, weights=None)
    url = torchvision.models.get_model_weights(name)["DEFAULT"].url
    file = folder / "hub" / "checkpoints" / url.split("/")[-1]
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    return network.eval()


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
@torch.no_grad()
def test_pretrained_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = store_download(name, tmp_path, monkeypatch)
    color, gray = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64)

    same = torchvision_model(name, num_classes=1000, weights="DEFAULT").eval()
    torch.testing.assert_close(same(color), trained(color))

    network = torchvision_model(name, num_classes=1000, in_channels=2, weights="IMAGENET1K_V1").eval()
    torch.testing.assert_close(network(gray.expand(-1, 2, -1, -1)), trained(gray.expand(-1, 3, -1, -1)))

    network = torchvision_model(name, num_classes=5, weights="DEFAULT")
    assert network.train()(color).shape == (2, 5)
    kept = trained.state_dict()
    changed = [key for key, value in network.eval().state_dict().items() if value.shape != kept[key].shape]
    assert {key.rpartition(".")[0] for key in changed} <= {"fc", "classifier.1"}


def test_small_images_crop_pretrained_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = store_download("squeezenet1_0", tmp_path, monkeypatch)
    network = torchvision_model("squeezenet1_0", num_classes=1000, weights="DEFAULT", small_images=True)
    assert torch.equal(network.features[0].weight, trained.features[0].weight[:, :, 2:5, 2:5])
    assert torch.equal(network.features[0].bias, trained.features[0].bias)


def hang(*args: object) -> None:
    time.sleep(5)
    refused()


def refused(*args: object) -> None:
    raise ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize(
    ("connect", "reason"), [(hang, "no response from .* within 1 s"), (refused, "Connection refused")]
)
def test_offline_fails_at_once(
    connect: Callable[..., None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", connect)
    for make, where in (
        (partial(torchvision_model, weights="DEFAULT"), "hub/checkpoints/resnet18-f37072fd.pth, or set weights"),
        (partial(timm_model, pretrained=True), "hf download timm/resnet18.a1_in1k` .*models--timm--resnet18.a1_in1k,"),
    ):
        begin = time.monotonic()
        with pytest.raises(FileNotFoundError, match=rf"{reason}\); .*{where}"):
            make("resnet18", num_classes=10)
        assert time.monotonic() - begin < 2


def test_connections_use_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []
    monkeypatch.setattr(
        socket, "create_connection", lambda address, timeout: addresses.append(address) or socket.socket()
    )
    for proxy in (None, "http://proxy.lan:3128", "proxy.lan:3128"):
        if proxy:
            monkeypatch.setenv("https_proxy", proxy)
        assert unreachable("https://huggingface.co/timm") == ""
    assert addresses == [("huggingface.co", 443), ("proxy.lan", 3128), ("proxy.lan", 3128)]


@torch.no_grad()
def test_cached_timm_weights_require_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refused)
    trained = timm_model("test_resnet", num_classes=1000)
    repository = tmp_path / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    file = repository / "snapshots" / "0123" / "model.safetensors"
    file.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    save_file(trained.state_dict(), file)
    network = timm_model("test_resnet", num_classes=5, pretrained=True)
    assert torch.equal(network.conv1[0].weight, trained.conv1[0].weight)
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_interrupted_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("lkd.models.factories.unreachable", lambda url: "")
    monkeypatch.setattr("lkd.models.downloads.unreachable", lambda url: "")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match=r"\(no route to host\); download https://\S+\.pth on another") as error:
        torchvision_model("resnet18", num_classes=10, weights="IMAGENET1K_V1")
    assert f"copy it to {tmp_path}/hub/checkpoints/resnet18-f37072fd.pth" in str(error.value)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(FileNotFoundError, match=r"resnet18 .* \(no route to host\); copy .* pretrained to false"):
        timm_model("resnet18", num_classes=10, pretrained=True)


@torch.no_grad()
def test_timm() -> None:
    network = timm_model("test_resnet", num_classes=5, in_channels=2)
    assert network(torch.rand(2, 2, 64, 64)).shape == (2, 5)
    network = timm_model("resnet10t", num_classes=5, small_images=True)  # its stem has three convolutions
    seen = []
    network.layer1.register_forward_hook(lambda layer, args, output: seen.append(tuple(args[0].shape[2:])))
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert seen == [(32, 32)]
    assert network.training
    with pytest.raises(ValueError, match="test_vit splits images into patches of 16x16"):
        timm_model("test_vit", num_classes=5, small_images=True)
    with pytest.raises(ValueError, match=r"repvgg_a0 does not accept images of 32x32 even with an adapted stem \(The"):
        timm_model("repvgg_a0", num_classes=5, small_images=True)


@torch.no_grad()
def test_timm_transformers_for_small_images() -> None:
    network = timm_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32, patch_size=8)
    assert network.patch_embed.grid_size == (4, 4)
    assert network.training
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 5)  # not a tuple of both heads' logits
    assert timm_model("test_vit", num_classes=0, img_size=32)(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"timm's resnet18 does not support img_size and patch_size .*; omit this"):
        timm_model("resnet18", num_classes=5, img_size=32, patch_size=4)


@pytest.mark.parametrize(
    ("factory", "name", "options", "message"),
    [
        (torchvision_model, "resnt18", {}, "torchvision has no network 'resnt18'; closest matches: resnet18"),
        (torchvision_model, "fcn_resnet50", {}, "torchvision has no network 'fcn_resnet50'"),
        (
            torchvision_model,
            "resnet50",
            {"weights": "IMAGENET1K_V3"},
            "torchvision's resnet50 has no weights 'IMAGENET1K_V3'; closest matches: IMAGENET1K_V2",
        ),
        (timm_model, "resnt18", {}, "timm has no network 'resnt18'; closest matches: resnet18"),
        (
            timm_model,
            "resnet18.a7_in1k",
            {},
            "timm has no pretrained weights 'resnet18.a7_in1k'; .*resnet18.a1_in1k",
        ),
        (
            timm_model,
            "botnet50ts_256",
            {"pretrained": True},
            "timm has no pretrained weights .*; closest matches: none",
        ),
    ],
)
def test_unknown_names(factory: object, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory(name, num_classes=10, **options)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ValueError, match=r"requires timm, which is not installed; run pip install 'lightning-kd\[timm\]'"
    ):
        timm_model("resnet18", num_classes=10)
