"""Runs that use the results of previous runs: teacher assistants, and generations of born-again networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lkd import DigitsDataModule
from lkd.__main__ import main
from lkd.models import load_weights, resnet8

SHORT = ["--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
BEST = "runs/digits/{}/version_{}/checkpoints/best.ckpt"


@pytest.fixture
def fit(capsys):
    """Return a function that runs a config and returns the printed accuracies of the teacher and the best student."""

    def run(*arguments: str) -> tuple[str, str]:
        assert main(["fit", *arguments, *SHORT]) == 0
        shown = capsys.readouterr().out
        return tuple(re.search(rf"{label}\D*([\d.]+%)", shown)[1] for label in ("Teacher accuracy", r"\(best\)"))

    return run


def test_teacher_assistant(fit) -> None:
    teacher, assistant = fit("--config", "digits/assistant")
    assert teacher == "99.65%"
    again, _ = fit("--config", "digits/takd")
    assert again == assistant


def test_born_again_ensemble(fit, capsys) -> None:
    _, first = fit("--config", "digits/born_again")
    taught_by, _ = fit(
        "--config", "digits/born_again", f"--model.init_args.teacher_ckpt={BEST.format('born_again', 0)}"
    )
    assert taught_by == first
    assert main(["test", "--config", "digits/born_again_ensemble", "--trainer.accelerator=cpu"]) == 0
    shown = float(re.search(r"test/acc\D*([\d.]+)", capsys.readouterr().out)[1])
    data = DigitsDataModule(batch_size=64, val_size=0.2)
    data.setup("test")
    networks = [load_weights(resnet8(10, 1), Path(BEST.format("born_again", number))).eval() for number in (0, 1)]
    right = total = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            said = torch.stack([network(batch.input).softmax(1) for network in networks]).mean(0)
            right += int((said.argmax(1) == batch.target).sum())
            total += len(batch.target)
    assert shown == pytest.approx(right / total, abs=1e-6)
