"""Loading weights files from other sources: layouts, names, types, errors, and malicious files."""

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lkd import models
from lkd.models import load_weights, resnet8
from lkd.models import weights as weights_module

REFERENCE = Path(__file__).parents[1] / "reference"
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def without_counts(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def akamaster(state: State) -> dict[str, object]:
    """Return the layout of the public CIFAR-10 teachers: DataParallel, an old PyTorch, and `linear` instead of `fc`."""
    renamed = {re.sub("^fc", "linear", name): tensor for name, tensor in without_counts(state).items()}
    return {"state_dict": prefixed("module.", renamed), "best_prec1": 91.78}


LAYOUTS: dict[str, Callable[[State], object]] = {
    "plain": lambda state: state,
    "akamaster": akamaster,
    "benchmark": lambda state: {"epoch": 240, "model": state, "accuracy": torch.tensor(76.4)},
    "options": lambda state: {"opt": argparse.Namespace(lr=0.05), "model": state},
    "student": lambda state: prefixed("student.", state) | prefixed("teacher.", {"fc.weight": torch.zeros(3, 3)}),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "nested": lambda state: {"state_dict": prefixed("model._orig_mod.module.", state)},
    "half": lambda state: {n: t.half() if t.is_floating_point() else t for n, t in state.items()},
    "beside": lambda state: {
        "state_dict": prefixed("model.", state) | {"criterion.adapter.weight": torch.zeros(2)},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(2)}}}],
    },
}


def trained(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    network = resnet8(num_classes=5)
    network(torch.rand(4, 3, 8, 8))  # changes the running statistics, so that the test covers them
    return network


def assert_same_weights(network: nn.Module, other: nn.Module, **tolerance: float) -> None:
    state, expected = without_counts(network.state_dict()), without_counts(other.state_dict())
    assert state.keys() == expected.keys()
    torch.testing.assert_close(list(state.values()), list(expected.values()), **tolerance)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, legacy: bool, tmp_path: Path) -> None:
    source, network = trained(), resnet8(num_classes=5)
    file = tmp_path / "weights.th"
    torch.save(LAYOUTS[layout](source.state_dict()), file, _use_new_zipfile_serialization=not legacy)
    assert load_weights(network, file) is network
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if layout == "half" else {"rtol": 0.0, "atol": 0.0}
    assert_same_weights(network, source, **tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_in_the_file(module: str, tmp_path: Path) -> None:
    beside = {"accuracy": np.float64(0.9), "epoch": np.int64(3), "loss": np.float32(0.1), "done": np.bool_(True)}
    torch.save({"model": trained().state_dict(), **beside}, tmp_path / "it.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "it.pth").read_bytes()
    (tmp_path / "it.pth").write_bytes(re.sub(rb"numpy\._?core\.multiarray", module.encode(), content))
    assert_same_weights(load_weights(resnet8(num_classes=5), tmp_path / "it.pth"), trained())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    source, network = trained(), resnet8(num_classes=5)
    save_file(prefixed("module.", source.to(dtype).state_dict()), tmp_path / "weights.safetensors")
    load_weights(network, str(tmp_path / "weights.safetensors"))
    assert_same_weights(network, source.float(), rtol=0.0, atol=0.0)


def test_lightning_checkpoint(tmp_path: Path) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = trained(), nn.Linear(2, 2)

    trainer = Trainer(logger=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(Module())
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    assert_same_weights(load_weights(resnet8(num_classes=5), tmp_path / "best.ckpt"), trained(), rtol=0, atol=0)


class Wrapped(nn.Module):
    """A user's network with a layer called `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.linear = nn.Linear(2, 3), nn.Linear(3, 2)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_layer_called_model(prefix: str, tmp_path: Path) -> None:
    source, network = Wrapped(), Wrapped()
    torch.save(prefixed(prefix, source.state_dict()), tmp_path / "weights.pt")
    assert_same_weights(load_weights(network, tmp_path / "weights.pt"), source, rtol=0, atol=0)


def test_benchmark_resnet18_fits_torchvision(tmp_path: Path) -> None:
    """The benchmark's ResNet-18 has layers `shortcut` and `linear` instead of torchvision's `downsample` and `fc`."""
    shapes = json.loads((REFERENCE / "models.json").read_text())["models"]["ResNet18"]["state_dict"]
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    save_file(state, tmp_path / "resnet18.safetensors")
    network = models.torchvision_model("resnet18", num_classes=100, small_images=True)
    load_weights(network, tmp_path / "resnet18.safetensors")
    assert torch.equal(network.layer2[0].downsample[1].weight, state["layer2.0.shortcut.1.weight"])
    assert torch.equal(network.fc.bias, state["linear.bias"])


@pytest.mark.parametrize("layout", ["plain", "akamaster"])
def test_new_head(layout: str, tmp_path: Path) -> None:
    """For fine-tuning with other classes, all weights except for the head are loaded from the file."""
    state = trained().state_dict()
    torch.save(LAYOUTS[layout](state), tmp_path / "five.pth")
    with pytest.raises(
        ValueError, match=r"do not match .* only the head \(fc\) does not match: .* and drop_head: true"
    ):
        load_weights(resnet8(num_classes=3), tmp_path / "five.pth")
    network = resnet8(num_classes=3)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items() if name.startswith("fc.")}
    load_weights(network, tmp_path / "five.pth", drop_head=True)
    expected = without_counts(state | own)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in without_counts(network.state_dict()).items())
    same = resnet8(num_classes=5)
    assert not torch.equal(load_weights(same, tmp_path / "five.pth", drop_head=True).fc.weight, state["fc.weight"])
    for drop_head in (True, False):  # mismatches elsewhere are not attributed to the head
        with pytest.raises(ValueError, match="do not match") as error:
            load_weights(resnet8(num_classes=3, in_channels=1), tmp_path / "five.pth", drop_head=drop_head)
        assert "conv1" in str(error.value)
        assert "drop_head" not in str(error.value)


def test_layers_with_the_heads_prefix_are_kept(tmp_path: Path) -> None:
    networks = [nn.Sequential() for _ in range(2)]
    for network in networks:
        network.add_module("fc_norm", nn.BatchNorm1d(4))
        network.add_module("fc", nn.Linear(4, 2))
    networks[0].fc_norm.running_mean.fill_(3.0)
    torch.save(networks[0].state_dict(), tmp_path / "w.pth")
    head = networks[1].fc.weight.clone()
    load_weights(networks[1], tmp_path / "w.pth", drop_head=True)
    assert networks[1].fc_norm.running_mean.tolist() == [3.0] * 4
    assert torch.equal(networks[1].fc.weight, head)


def test_no_head_to_drop(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 3, 1)
    torch.save(network.state_dict(), tmp_path / "conv.pth")
    with pytest.raises(ValueError, match="requires a linear layer, but Conv2d has none"):
        load_weights(network, tmp_path / "conv.pth", drop_head=True)


def test_mismatch_raises_one_error_and_changes_nothing(tmp_path: Path) -> None:
    source = models.resnet14(num_classes=100, in_channels=1, shortcut="A").state_dict()
    torch.save(prefixed("module.", source), tmp_path / "teacher.pth")
    network, before = trained(), trained()
    with pytest.raises(ValueError, match="do not match CIFARResNet") as error:
        load_weights(network, tmp_path / "teacher.pth")
    message = str(error.value)
    assert str(tmp_path / "teacher.pth") in message
    assert "missing: layer2.0.downsample.0.weight, " in message
    assert "and 6 more" in message  # of 10: the batch counts of BatchNorm may be missing
    assert "unexpected: layer1.1.conv1.weight, " in message
    assert "conv1.weight is (16, 1, 3, 3) in the file and (16, 3, 3, 3) in the network" in message
    assert "fc.weight is (100, 64) in the file and (5, 64) in the network" in message
    assert "num_batches_tracked" not in message.split("unexpected")[0]
    assert "\n" not in message
    assert_same_weights(network, before, rtol=0, atol=0)


class Attack:
    """An object whose unpickling runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("write", ["zip", "legacy", "pickle0", "pickle2", "pickle4", "safetensors"])
def test_code_in_a_file_is_not_run(write: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, file = tmp_path / "marker", tmp_path / ("w.safetensors" if write == "safetensors" else "w.pt")
    content = {"state_dict": resnet8(num_classes=5).state_dict(), "extra": Attack(marker)}
    if write.startswith("pickle"):
        file.write_bytes(pickle.dumps(content["extra"], protocol=int(write[-1])))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=write != "legacy")
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    reason = r"code to be executed \(\w+\.system\)" if write in ("zip", "legacy", "pickle0", "pickle2") else "is not a"
    with pytest.raises(ValueError, match=reason):
        load_weights(resnet8(num_classes=5), file)
    assert not marker.exists()
    if write != "safetensors":  # the attack works if the file is read without protection
        torch.load(file, weights_only=False) if not write.startswith("pickle") else pickle.loads(file.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "text.pth",
            b"not weights",
            r"text.pth is not a PyTorch weights file, or it is corrupt \(",
        ),
        ("empty.pth", b"", r"is not a PyTorch weights file.* \(EOFError\)"),
        ("pointer.safetensors", b"version https://git-lfs", "is not a safetensors file, or it is corrupt"),
        (
            "optimizer.pt",
            {"epoch": 3, "optimizer": {}},
            "contains no weights but a dictionary of epoch, optimizer; expected",
        ),
        ("tensor.pt", torch.zeros(3), "contains no weights but a Tensor; expected a state dict"),
        ("network.pt", nn.Linear(2, 2), r"code to be executed \(torch.nn.modules.linear.Linear\)"),
    ],
)
def test_files_without_weights(name: str, content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        load_weights(resnet8(num_classes=5), file)


@pytest.mark.parametrize("keep", [0.1, 0.9])
@pytest.mark.parametrize("name", ["best.pt", "best.safetensors"])
def test_damaged_files(name: str, keep: float, tmp_path: Path) -> None:
    file, state = tmp_path / name, trained().state_dict()
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match="or it is corrupt"):
        load_weights(resnet8(num_classes=5), file)


def test_missing_files(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "resnet56.pth")
    with pytest.raises(FileNotFoundError, match=r"weights file not found: .*resnet65.pth; similar names: resnet56.pth"):
        load_weights(resnet8(num_classes=5), tmp_path / "resnet65.pth")
    with pytest.raises(FileNotFoundError, match=r"weights file not found: .*; correct the path, or train"):
        load_weights(resnet8(num_classes=5), tmp_path / "nowhere" / "best.ckpt")
    with pytest.raises(FileNotFoundError, match="is a folder; give the path of a weights file"):
        load_weights(resnet8(num_classes=5), tmp_path)


def test_packaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "PRETRAINED", tmp_path / "pretrained")
    with pytest.raises(FileNotFoundError, match="lkd:digits is not included in lkd; available weights: none"):
        load_weights(resnet8(num_classes=5), "lkd:digits")
    (tmp_path / "pretrained").mkdir()
    save_file(trained().state_dict(), tmp_path / "pretrained" / "digits.safetensors")
    assert_same_weights(load_weights(resnet8(num_classes=5), "lkd:digits"), trained(), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="lkd:digit is not included in lkd; available weights: lkd:digits"):
        load_weights(resnet8(num_classes=5), "lkd:digit")


if "LKD_WEIGHTS" in os.environ:
    FILES = sorted(Path(os.environ["LKD_WEIGHTS"]).glob("resnet*.th"))

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
    @torch.no_grad()
    def test_real_teachers(file: Path) -> None:
        """The public CIFAR-10 teachers give the original code's outputs on eight images of aeroplanes."""
        depth = int(re.match(r"resnet(\d+)", file.name)[1])
        network = load_weights(getattr(models, f"resnet{depth}")(num_classes=10, shortcut="A"), file).eval()
        reference = load_file(REFERENCE / "akamaster_resnet20.safetensors")
        image = reference["case0.input.image_uint8_nhwc"].permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        features: State = {}
        for layer in ("layer1", "layer2", "layer3"):
            network.get_submodule(layer).register_forward_hook(
                lambda module, args, output, layer=layer: features.update({layer: output})
            )
        logits = network((image - mean) / std)
        assert (logits.argmax(dim=1) == reference["case0.input.target"]).sum() >= 6
        if depth == 20:
            torch.testing.assert_close(logits.double(), reference["case0.expected.logits"], rtol=0, atol=1e-4)
            for layer, feature in features.items():
                expected = reference[f"case0.expected.{layer}_mean_over_hw"]
                torch.testing.assert_close(feature.mean(dim=(2, 3)).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("trained", "built"), [("A", "B"), ("B", "A")])
def test_other_shortcut_is_suggested(tmp_path: Path, trained: str, built: str) -> None:
    torch.save(resnet8(num_classes=4, shortcut=trained).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"set shortcut of the network to {trained}"):
        load_weights(resnet8(num_classes=4, shortcut=built), str(tmp_path / "other.pth"))
    load_weights(resnet8(num_classes=4, shortcut=trained), str(tmp_path / "other.pth"))
