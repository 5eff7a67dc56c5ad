"""A user-defined task, as in the guide: supported and unsupported features."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

import lkd
from lkd.__main__ import main
from lkd.callbacks.prediction_formats import ArrayFiles
from lkd.export import export

GUIDE = Path(__file__).parents[2] / "docs/pages/extending/task.md"
RUN = "runs/depth_teacher/version_0/checkpoints/best.ckpt"


@pytest.fixture
def trained(monkeypatch) -> None:
    """Train the guide's teacher."""
    monkeypatch.syspath_prepend(Path.cwd())
    for text in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL):
        Path(re.match(r"# (\S+)", text)[1]).write_text(text)
    assert main(["fit", "--config=depth_teacher.yaml", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]) == 0


def test_supported_features(trained, capfd) -> None:
    checkpoint = torch.load(RUN, weights_only=True)
    (best,) = [state for name, state in checkpoint["callbacks"].items() if "'monitor': 'val/delta1'" in name]
    assert 0 < float(best["best_model_score"]) <= 1
    config = yaml.safe_load(Path("runs/depth_teacher/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["task"] == {"class_path": "depth.Depth", "init_args": {"threshold": 1.25}}
    capfd.readouterr()
    assert main(["compare", "runs/depth_teacher"]) != 0
    assert "lkd compare does not support the task Depth" in capfd.readouterr().err


def test_predictions(trained, capfd) -> None:
    assert main(["predict", f"--ckpt_path={RUN}", "--data=depth.RoomDataModule"]) == 0
    assert "128 images written to runs/predict/version_0/predictions.csv" in capfd.readouterr().out
    folder = Path("runs/predict/version_0")
    lines = (folder / "predictions.csv").read_text().splitlines()
    assert lines[:2] == ["index,array", "0,arrays/000000.npy"]
    assert len(lines) == 129
    depth = importlib.import_module("depth")
    module, data = lkd.ClassificationModule.load_from_checkpoint(RUN, map_location="cpu").eval(), depth.RoomDataModule()
    data.setup("predict")
    with torch.no_grad():
        expected = module(data.data.tensors[0])
    found = np.stack([np.load(folder / line.partition(",")[2]) for line in lines[1:]])
    assert np.allclose(found, expected.numpy(), atol=1e-5)


class Halves(NamedTuple):
    """Predictions that consist of two tensors."""

    left: Any
    right: Any


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_tuples_are_written_as_npz(dtype: torch.dtype, tmp_path) -> None:
    files = ArrayFiles(None, None)
    halves = Halves(torch.arange(6, dtype=dtype).view(2, 3), torch.tensor([7, 8]))
    records = list(files.records(halves, [4, 9], None, tmp_path))
    assert records == [(4, {"array": "arrays/000004.npz"}), (9, {"array": "arrays/000009.npz"})]
    second = np.load(tmp_path / "arrays/000009.npz")
    assert {name: second[name].tolist() for name in second} == {"left": [3, 4, 5], "right": 8}
    for unsupported in (Halves([1, 2], torch.zeros(2)), torch.zeros(3, 2), {"a": 1}):
        with pytest.raises(
            ValueError, match=r"predict writes tensors \(B, ...\) and named tuples.*call trainer.predict"
        ):
            list(files.records(unsupported, [4, 9], None, tmp_path))


def test_export(trained) -> None:
    exported = export("runs/depth_teacher", formats=["onnx"])
    (done,) = exported.files
    assert (done.images, done.score) == (128, done.expected_score)
    assert done.difference < 1e-4
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    assert session.run(None, {"image": np.zeros((1, 3, 24, 40), np.float32)})[0].shape == (1, 1, 24, 40)
    assert "A network for the task Depth with 593 parameters" in (exported.folder / "README.md").read_text()


def test_callback_for_classification_is_rejected(trained, capfd) -> None:
    knn = ["--trainer.callbacks+=lkd.callbacks.KNN", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config=depth_teacher.yaml", *knn]) != 0
    assert "KNN supports classification only, but the task is Depth" in capfd.readouterr().err


ERROR = """
from torchmetrics import MeanAbsoluteError

from depth import Depth


class DepthError(Depth):
    metric, metric_title, metric_format = "mae", "mean absolute error", ".3f"

    def metrics(self) -> dict:
        return {"mae": MeanAbsoluteError()}

    def update(self, metrics: dict, logits, target) -> None:
        metrics["mae"].update(logits.squeeze(1), target.log())
"""


def test_error_as_main_metric(trained, capfd) -> None:
    """If lower values are better, the best checkpoint has the lowest, and reports do not show percentages."""
    Path("error.py").write_text(ERROR)
    settings = ["--config=depth.yaml", "--model.init_args.task=error.DepthError", "--trainer.max_epochs=4"]
    worse = [f"--model.init_args.optimizer{end}" for end in ("=torch.optim.SGD", ".lr=0.02", ".maximize=true")]
    assert main(["fit", *settings, *worse, "--config=loggers/csv", "--trainer.accelerator=cpu"]) == 0
    checkpoint = torch.load("runs/depth+csv/version_0/checkpoints/last.ckpt", weights_only=True)
    (best,) = [state for name, state in checkpoint["callbacks"].items() if "'monitor': 'val/mae'" in name]
    with Path("runs/csv/version_0/metrics.csv").open() as file:
        errors = [float(row["val/mae"]) for row in csv.DictReader(file) if row["val/mae"]]
    assert errors == sorted(errors)
    assert len(set(errors)) == 4
    assert float(best["best_model_score"]) == pytest.approx(errors[0])
    output = capfd.readouterr().out
    assert "mean absolute error on the validation images" in output
    assert re.search(r"gap to teacher +│ +\+\d\.\d{3} ", output)
    assert f"{errors[0]:.3f}" in output
    assert "%" not in output
