"""Each method trains with a graph on the simulated device, bitwise equal to training with ordinary steps on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkd.models.weights import PRETRAINED
from tests.pretended.device import NAME
from tests.pretended.runs import differences, fit, overlay, trained
from tests.test_configs import FOLDER, OVERLAYS, _contains, _image_folder

HOST_BATCHES = {
    "mlkd": "RandAugment chooses the operations for its images on the host",
    "noisy_student": "RandAugment chooses the operations for its images on the host",
}
"""Overlays whose batches are created without a graph, with the reason. Their steps still use graphs."""

NO_GRAPH = {"kdsvd": "the library that decomposes matrices looks at its results on the host"}
"""Overlays whose steps run without a graph, with the reason."""


@pytest.fixture
def _shallow(monkeypatch) -> None:
    """Reduce transformers from 12 to 4 blocks; tests/test_configs.py trains them in full."""
    monkeypatch.setattr("timm.create_model", partial(timm.create_model, depth=4))


@pytest.mark.usefixtures("_shallow")
@pytest.mark.parametrize("name", OVERLAYS["methods"])
def test_method_overlays(name: str, pretended, capfd, recwarn) -> None:
    Path("data").mkdir()
    Path("data/unlabelled").symlink_to(Path(_image_folder(10)).resolve())
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention kernel rounds differently
        expected = fit("cpu", "cpu", *overlay(name))
        capfd.readouterr()
        graph = fit("gpu", NAME, *overlay(name))
    assert "whole step as a CUDA graph" in capfd.readouterr().out
    warned = [str(warning.message) for warning in recwarn if "without a graph" in str(warning.message)]
    assert any("batches are created" in text for text in warned) == (name in HOST_BATCHES), warned
    assert any("the training step runs" in text for text in warned) == (name in NO_GRAPH), warned
    assert not differences(trained(expected), trained(graph))
    _assert_settings_are_kept(name)


def test_fine_tuning(pretended, capfd) -> None:
    """Two parameter groups, and frozen layers with unchanged statistics, train with a graph as without one."""
    module = ["--config=digits/teacher", "--model=lkd.FineTuneModule", "--model.init_args.frozen=[conv1,bn1]"]
    weights = "--model.init_args.model_ckpt=lkd:digits_resnet8"
    expected = fit("cpu", "cpu", *module, weights)
    capfd.readouterr()
    graph = fit("gpu", NAME, *module, weights)
    assert "whole step as a CUDA graph" in capfd.readouterr().out
    assert not differences(trained(expected), trained(graph))
    initial = load_file(PRETRAINED / "digits_resnet8.safetensors")
    changed = {name for name, tensor in initial.items() if not tensor.equal(graph["state_dict"][f"model.{name}"])}
    assert {name.split(".")[0] for name in changed} == {"layer1", "layer2", "layer3", "fc"}


def _assert_settings_are_kept(name: str) -> None:
    (saved,) = Path("cpu").rglob("config.yaml")
    resolved = yaml.safe_load(saved.read_text())
    given = yaml.safe_load((FOLDER / "methods" / f"{name}.yaml").read_text())
    for key, value in given.get("model", {}).get("init_args", {}).items():
        assert _contains(resolved["model"]["init_args"][key], value), key


def test_exceptions_are_overlays() -> None:
    assert set(HOST_BATCHES) | set(NO_GRAPH) <= set(OVERLAYS["methods"])
