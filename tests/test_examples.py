"""Short runs of the examples with inputs other than images, with the command line."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils._pytree import tree_leaves

from lkd.__main__ import main
from lkd.callbacks.monitor import network_size

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "text": ["--data.init_args.per_library=800", "--data.init_args.label_size=100", "--trainer.max_epochs=3"],
    "audio": ["--data.init_args.train_size=1000", "--data.init_args.label_size=100", "--trainer.max_epochs=4"],
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module", params=["text", "audio"])
def example(request, tmp_path_factory) -> tuple[str, Path, list[str]]:
    """Yield an example's name, its folder with a trained teacher, and the settings of a short run."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    for path in EXAMPLES.glob(f"{name}*"):
        shutil.copy(path, folder)
    settings = [*SHORT[name], *QUIET]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        assert main(["fit", f"--config={name}_teacher.yaml", *settings, "--data.init_args.label_size=null"]) == 0
        yield name, folder, settings
    sys.modules.pop(name)


@pytest.fixture
def there(example, monkeypatch) -> tuple[str, list[str]]:
    name, folder, settings = example
    monkeypatch.chdir(folder)
    return name, settings


def _tested(name: str, capsys) -> dict[str, float]:
    capsys.readouterr()
    best = f"runs/{name}/version_0/checkpoints/best.ckpt"
    assert main(["test", f"--ckpt_path={best}", *QUIET]) == 0
    lines = [line.strip("│ \n").split("│") for line in capsys.readouterr().out.splitlines() if "test/" in line]
    return {left.strip(): float(right) for left, right in lines}


def test_training_with_unlabelled_samples(there, capsys) -> None:
    name, settings = there
    assert main(["fit", f"--config={name}_student.yaml", *settings]) == 0
    assert main(["fit", f"--config={name}.yaml", *settings]) == 0
    alone, distilled = _tested(f"{name}_student", capsys), _tested(name, capsys)
    assert distilled["test/acc"] > alone["test/acc"]
    assert distilled["test/teacher_acc"] > 0.3
    assert distilled["test/agreement"] > 0.3
    best = f"runs/{name}/version_0/checkpoints/best.ckpt"
    assert main(["predict", f"--ckpt_path={best}", *QUIET]) == 0
    rows = list(csv.DictReader(Path("runs/predict/version_0/predictions.csv").read_text().splitlines()))
    assert len({row["index"] for row in rows}) == len(rows) > 100
    assert L.LightningModule.load_from_checkpoint(best, map_location="cpu").criterion.temperature == 2


def test_resume(there, capsys) -> None:
    name, settings = there
    args = ["fit", f"--config={name}.yaml", *settings, "--trainer.default_root_dir=resumed", "--resume"]
    assert main([*args, "--trainer.max_epochs=1"]) == 0
    assert main([*args, "--trainer.max_epochs=2"]) == 0
    assert [path.name for path in Path("resumed", name).iterdir()] == ["version_0"]
    state = torch.load(f"resumed/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["epoch"] == 2  # the number of the next epoch


@pytest.mark.parametrize("criterion", ["RKD", "PKT", "SP"])
def test_criteria_read_features(there, criterion: str, capsys) -> None:
    name, settings = there
    layers = ["--model.init_args.criterion.init_args.student_layers=['@pooled']"]
    layers += ["--model.init_args.criterion.init_args.teacher_layers=['@pooled']"]
    changed = [f"--model.init_args.criterion=lkd.losses.{criterion}", *(layers if criterion == "SP" else [])]
    assert main(["fit", f"--config={name}.yaml", *settings, *changed, "--trainer.fast_dev_run=2"]) == 0


def test_layers_are_listed(there, capsys) -> None:
    name, _ = there
    assert main(["layers", f"--config={name}.yaml"]) == 0
    shown = capsys.readouterr().out
    inputs = {"text": "for one input {'words': (1, 32), 'mask': (1, 32)}", "audio": "for one image (1, 1, 65, 33)"}
    assert inputs[name] in shown
    assert "@pooled" in shown


def test_checkpoint_contains_the_blank_input(example) -> None:
    name, folder, _ = example
    path = folder / f"runs/{name}_teacher/version_0/checkpoints/best.ckpt"
    example_input = torch.load(path, weights_only=True)["lkd"]["example_input"]
    assert len(tree_leaves(example_input)) == (2 if name == "text" else 1)
    assert (example_input is None) == (name == "audio")


def test_transformer_layers_are_counted() -> None:
    """PyTorch's fast path for inference is one operation, which its counter does not support."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    by_hand = 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16)  # projections and the two linear layers, of five words
    assert network_size("", layer, torch.zeros(1, 5, 8)).flops >= by_hand
    assert torch.backends.mha.get_fastpath_enabled()
