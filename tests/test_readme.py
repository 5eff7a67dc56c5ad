"""The commands and examples in the README and the documentation run unchanged."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights, resnet18

from lkd.__main__ import main
from lkd.cli import seeds
from lkd.cli.lightning_cli import LkdCLI

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs/pages").rglob("*.md")))}
BLOCKS = [
    (kind, re.sub(r"\\\n\s*", "", block))  # commands may continue on the next line
    for text in PAGES.values()
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = list(
    dict.fromkeys(
        line for kind, text in BLOCKS if kind == "console" for line in text.splitlines() if line.startswith("lkd ")
    )
)
CHAINS = [
    commands
    for kind, text in BLOCKS
    if kind == "sh"
    for chain in text.split("\n\n")
    if (commands := [line for line in chain.splitlines() if line.startswith("lkd ")])
]
SHORT = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Create the files, images and teacher that the pages use, and the weights that would be downloaded."""
    root = tmp_path_factory.mktemp("reader")
    for _, text in BLOCKS:
        if named := re.match(r"# (\w+\.(py|yaml))\n", text):
            (root / named[1]).write_text(text)
    rng = np.random.default_rng(0)
    for split, name, number in ((s, c, n) for s in ("train", "test") for c in ("hat", "shoe") for n in range(20)):
        folder = root / "shop" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    torch.save(resnet18(num_classes=2).state_dict(), root / "teacher.pth")
    for kind, images in (("flowers/daisy", 10), ("flowers/tulip", 10), ("new", 2)):
        (root / kind).mkdir(parents=True)
        for number in range(images):
            shutil.copy(root / f"shop/train/hat/{number}.jpg", root / kind)
    weights = root / "torch/hub/checkpoints"
    weights.mkdir(parents=True)
    torch.save(resnet18().state_dict(), weights / Path(ResNet18_Weights.DEFAULT.url).name)
    return root


@pytest.fixture
def reader(files: Path, monkeypatch) -> None:
    """Link the files of the pages into the working folder."""
    shutil.copytree(files, Path.cwd(), copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("TORCH_HOME", "torch")  # contains the weights, so nothing is downloaded


@pytest.fixture
def short(monkeypatch) -> None:
    """Limit each run to one epoch of at most four batches on the CPU; `make demo` trains in full.

    The runs of `--seeds` train in this process; tests/test_seeds.py covers a separate process.
    """
    own = LkdCLI.instantiate_trainer
    settings = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 4, "accelerator": "cpu"}
    monkeypatch.setattr(LkdCLI, "instantiate_trainer", lambda cli, **given: own(cli, **{**given, **settings}))
    monkeypatch.setattr(seeds, "_fit", lambda args: main(["fit", *args]))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, reader: None, short: None) -> None:
    arguments = shlex.split(command)[1:]
    assert main(arguments) == 0
    if arguments[0] == "fit":
        (best,) = Path("runs").rglob("best.ckpt")
        assert main(["test", "--ckpt_path", str(best), "--trainer.accelerator=cpu"]) == 0


def test_number_of_commands() -> None:
    assert len(COMMANDS) == 18
    assert len(CHAINS) == 14


@pytest.mark.parametrize("chain", CHAINS)
def test_chains(chain: list[str], reader: None, short: None) -> None:
    """Each command continues from the preceding one; chains without training start from a run on the digits."""
    few = {"sweep": ["--trials=2"], "compare": ["--seconds=0.02"]}
    if not any(command.startswith("lkd fit") for command in chain):
        assert main(["fit", "--config=digits/kd", *SHORT]) == 0
    for command in chain:
        words = shlex.split(command, comments=True)[1:]
        arguments = [
            path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        assert main([*arguments, *few.get(arguments[0], [])]) == 0


def test_weights_with_another_head(reader: None) -> None:
    shop = ["--data=lkd.ImageFolderDataModule", "--data.init_args.root=shop", "--data.init_args.image_size=32"]
    assert main(["fit", "--config=finetune_own.yaml", *shop, *SHORT, "--trainer.limit_train_batches=1"]) == 0
    (best,) = Path("runs").rglob("best.ckpt")
    own, begun = torch.load(best, weights_only=True)["state_dict"], torch.load("teacher.pth", weights_only=True)
    assert own["model.fc.weight"].shape == (5, 512)
    assert own["model.conv1.weight"].sub(begun["conv1.weight"]).abs().max() < 0.1


def test_own_criterion_logs_its_terms(reader: None) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["fit", "--config", "configs/digits/kd.yaml", "--config", "gap.yaml", *SHORT]) == 0
    (run,) = Path("runs").rglob("version_0")
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"train/gap_logits", "train/gap_features"} <= set(events.Tags()["scalars"])
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert "criterion.adapter.weight" in content["state_dict"]


@pytest.mark.parametrize("script", [text for kind, text in BLOCKS if text.startswith("import lightning")])
def test_python(script: str, capsys) -> None:
    """The script trains a student to more than 80% test accuracy."""
    names: dict[str, Any] = {}
    exec(compile(script, "README.md", "exec"), names)
    assert "test/agreement" in capsys.readouterr().out
    assert names["trainer"].callback_metrics["test/acc"] > 0.8


def test_readme_is_short_and_its_links_exist() -> None:
    readme = PAGES[ROOT / "README.md"]
    assert len(readme.encode()) <= 8192
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
