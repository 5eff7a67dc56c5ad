"""All commands and complete configs run on the simulated device; results are compared with those of the CPU."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import nn

from lkd.__main__ import main
from lkd.models import fcos
from tests.pretended.device import NAME
from tests.pretended.runs import SHORT, differences, fit, trained
from tests.test_configs import BEFORE, ON_DEVICE, needs

ON = f"--trainer.accelerator={NAME}"
KD = ["--config", "digits/kd", "--data.init_args.batch_size=16"]
SMALL = [f"--data.init_args.{size}" for size in ("batch_size=4", "train_size=40", "test_size=8")]
SEGMENTATION = ["--config", "shapes/kd", *SMALL, "--data.init_args.size=16"]


@pytest.mark.parametrize("config", ON_DEVICE)
def test_complete_configs(config: str, pretended, capfd) -> None:
    settings = needs(config)  # DeepInversion creates its images on the device
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    for earlier in BEFORE.get(config, []):
        assert main(["fit", "--config", earlier, *settings, *short, "--trainer.accelerator=cpu"]) == 0
    capfd.readouterr()
    fit("there", NAME, "--config", config, *settings, *short)
    assert "whole step as a CUDA graph" in capfd.readouterr().out
    assert list(Path("there", config.removesuffix(".yaml")).rglob("best.ckpt"))


@pytest.mark.parametrize(
    ("settings", "commands"),
    [
        (KD, ("validate", "test", "predict")),
        (SEGMENTATION, ("validate",)),
        (["--config", "detection/kd_ld", "--model.init_args.teacher_ckpt=null", *SMALL], ("validate",)),
    ],
    ids=["classification", "segmentation", "detection"],
)
def test_evaluation(settings: list[str], commands: tuple[str, ...], pretended, capfd) -> None:
    fit("run", "cpu", *settings)
    (path,) = Path("run").rglob("last.ckpt")
    lines = {}
    for command in commands:
        for place in ("cpu", NAME):
            capfd.readouterr()
            where = [f"--trainer.accelerator={place}", "--trainer.precision=32-true", "--speed.channels_last=false"]
            assert main([command, *settings, "--ckpt_path", str(path), *where]) == 0
            output = capfd.readouterr().out
            measured = [line for line in output.splitlines() if "val/" in line or "test/" in line]
            lines[command, place] = measured if command != "predict" else _predicted()
            assert lines[command, place]
        assert lines[command, "cpu"] == lines[command, NAME]


@pytest.mark.parametrize(
    ("config", "settings", "number"),
    [
        ("shapes/teacher", ["--model.init_args.model_ckpt=lkd:shapes_unet"], 6),
        ("detection/student", ["--model.init_args.model_ckpt=detector.pt"], 1),
    ],
)
def test_predictions_of_masks_and_boxes(config: str, settings: list[str], number: int, pretended) -> None:
    torch.manual_seed(0)
    detector = fcos(num_classes=5, filters=(8, 8, 16), num_convs=1, reg_max=8)
    nn.init.zeros_(detector.network.head.classification_head.cls_logits.bias)  # high scores: it predicts boxes
    torch.save(detector.state_dict(), "detector.pt")
    data = [f"--data.init_args.{size}" for size in ("test_size=5", "train_size=20", "batch_size=2")]
    found = []
    for place in ("cpu", NAME):
        where = [f"--trainer.accelerator={place}", "--trainer.precision=32-true", "--speed.channels_last=false"]
        assert main(["predict", f"--config={config}", *settings, *data, *where]) == 0
        found.append(_predicted())
    assert len(found[0]) == number
    assert all(len(content) > 60 for content in found[0].values())
    assert found[0] == found[1]


def test_predictions_of_an_own_task(pretended, monkeypatch) -> None:
    """The task of the guide, whose predictions are written as arrays."""
    monkeypatch.syspath_prepend(Path.cwd())
    guide = Path(__file__).parents[2] / "docs/pages/extending/task.md"
    for text in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", guide.read_text(), re.MULTILINE | re.DOTALL):
        Path(re.match(r"# (\S+)", text)[1]).write_text(text)
    depth = importlib.import_module("depth")
    torch.save(depth.depth_net(16).state_dict(), "depth.pt")
    weights = "--model.init_args.model_ckpt=depth.pt"
    found = []
    for place in ("cpu", NAME):
        where = [f"--trainer.accelerator={place}", "--trainer.precision=32-true", "--trainer.limit_predict_batches=2"]
        assert main(["predict", "--config=depth_teacher.yaml", weights, *where]) == 0
        found.append(_predicted())
    assert len(found[0]) == 33
    assert found[0] == found[1]


def _predicted() -> dict[Path, bytes]:
    """Return the contents of all files of the last prediction and remove them."""
    folder = Path("runs/predict/version_0")
    content = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    shutil.rmtree(folder)
    return content


class Stop(L.Callback):
    """Stops a run after a number of steps; unlike `max_steps`, it does not change the length of schedules."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step >= self.after


def _stopping(after: int) -> Path:
    path = Path("stop.yaml")
    path.write_text(
        f"trainer: {{callbacks+: [{{class_path: tests.pretended.test_commands.Stop, init_args: {{after: {after}}}}}]}}"
    )
    return path


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_within_an_epoch(stop: int, pretended) -> None:
    """A run stopped after ordinary steps or replays and resumed equals uninterrupted runs, also on the CPU."""
    long = [*KD, "--trainer.limit_train_batches=4", "--trainer.max_epochs=3"]
    expected = fit("cpu", "cpu", *long)
    whole = fit("whole", NAME, *long)
    fit("begun", NAME, *long, "--config", str(_stopping(stop)))
    (last,) = Path("begun").rglob("last.ckpt")
    parts = fit("rest", NAME, *long, "--ckpt_path", str(last))
    assert not differences(trained(whole), trained(parts))
    assert not differences(trained(expected), trained(parts))


def test_checkpoint_contains_cpu_tensors(pretended) -> None:
    checkpoint = fit("run", NAME, *KD)
    assert all(type(tensor) is torch.Tensor for tensor in checkpoint["state_dict"].values())
    assert checkpoint["state_dict"]["model.conv1.weight"].device.type == "cpu"


@pytest.mark.parametrize("top_k", [None, 3])
def test_cached_logits(top_k: int | None, pretended, capfd) -> None:
    """A run that fills the cache, one that reads it and one on the CPU are bitwise equal."""
    cached = [*KD, "--teacher_cache.versions=2", "--trainer.max_epochs=5", "--trainer.limit_train_batches=1.0"]
    cached += ["--data.init_args.batch_size=200", *([] if top_k is None else [f"--teacher_cache.top_k={top_k}"])]
    expected = fit("cpu", "cpu", *cached, "--teacher_cache.folder=cpu_cache")
    fills = fit("fills", NAME, *cached, "--teacher_cache.folder=cache")
    capfd.readouterr()
    reads = fit("reads", NAME, *cached, "--teacher_cache.folder=cache")
    assert "2 of 2 variants found" in capfd.readouterr().out
    assert not differences(trained(expected), trained(fills))
    assert not differences(trained(fills), trained(reads))


@pytest.mark.parametrize("settings", [KD, SEGMENTATION], ids=["classification", "segmentation"])
def test_compare(settings: list[str], pretended) -> None:
    fit("run", NAME, *settings)
    run = next(Path("run").rglob("version_0"))
    for place in ("cpu", NAME):
        quick = ["--seconds=0.01", "--batch_sizes=[1]", f"--output={place}", f"--accelerator={place}"]
        assert main(["compare", f"one={run}", *quick]) == 0
    expected, found = (json.loads(next(Path(place).rglob("comparison.json")).read_text()) for place in ("cpu", NAME))
    for name in ("one", "teacher"):
        assert expected["networks"][name]["metrics"] == found["networks"][name]["metrics"]


def test_export_and_layers(pretended, monkeypatch) -> None:
    fit("run", NAME, *KD)
    one = str(next(Path("run").rglob("version_0")))
    monkeypatch.setattr(
        _AcceleratorConnector, "_choose_auto_accelerator", lambda *_: NAME
    )  # as on a machine with a GPU
    assert main(["export", one, "--format=safetensors,torch", "--output=exported", "--images=50"]) == 0
    assert {".safetensors", ".pt2", ".md"} <= {path.suffix for path in Path("exported").iterdir()}
    assert main(["layers", "--config", "digits/kd"]) == 0


def test_sweep(pretended) -> None:
    args = ["--trials=2", "--space=sweep/temperature_weight", ON, "--trainer.max_epochs=1", *SHORT[1:]]
    assert main(["sweep", "--config", "digits/kd", *args]) == 0
    assert list(Path("runs").rglob("best.yaml"))
