"""A user-defined task, as in the guide: supported and unsupported features."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from lkd.__main__ import main
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
    for command, message in (
        (["compare", "runs/depth_teacher"], "lkd compare does not support the task Depth"),
        (
            ["predict", f"--ckpt_path={RUN}", "--data=depth.RoomDataModule"],
            "supports the tasks Classification, SemanticSegmentation, Detection, but the task is Depth",
        ),
    ):
        capfd.readouterr()
        assert main(command) != 0
        assert message in capfd.readouterr().err


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
