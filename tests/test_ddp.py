"""Two processes (gloo): equal students, equal metrics, a teacher that stays out of it.

`LKD_PROCESSES=4 pytest tests/test_ddp.py tests/losses/test_processes.py` compares four processes with one.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lkd import DigitsDataModule
from lkd.models import CIFARResNet, load_weights, resnet8
from tests.losses.processes import PROCESSES

SPY = """
    import hashlib, json
    from pathlib import Path
    import lightning as L
    import torch

    def digest(network):
        sums = hashlib.sha256()
        for tensor in network.state_dict().values():
            sums.update(tensor.numpy().tobytes())
        return sums.hexdigest()

    class Spy(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.teacher = digest(pl_module.teacher)
            if trainer.global_rank == 1:  # a broadcast would bring rank 0's statistics here
                pl_module.teacher.bn1.running_mean += 1
                self.teacher = digest(pl_module.teacher)

        def on_fit_end(self, trainer, pl_module):
            seen = {
                "student": digest(pl_module.student),
                "teacher_kept": digest(pl_module.teacher) == self.teacher,
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            }
            Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
"""


def test_two_processes_end_equal(tmp_path) -> None:
    Path("spy.py").write_text(textwrap.dedent(SPY))
    command = [sys.executable, "-m", "lkd", "fit", "--config", "digits/kd", "--trainer.max_epochs=2"]
    settings = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    spy = [
        "--trainer.callbacks+=spy.Spy",
        "--trainer.enable_progress_bar=false",
        "--data.init_args.val_size=0.1",
    ]
    done = subprocess.run([*command, *settings, *spy], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["student"] == second["student"]
    assert first["teacher_kept"]
    assert second["teacher_kept"]
    speed = "train/images_per_s"
    assert first["metrics"].pop(speed) > 0
    second["metrics"].pop(speed)
    assert first["metrics"] == pytest.approx(second["metrics"], nan_ok=False)
    assert {"train/loss", "train/kd", "val/acc", "val/agreement"} <= set(first["metrics"])
    assert len(list(Path("runs").rglob("config.yaml"))) == 1


WATCH = """
    import json
    from pathlib import Path
    import lightning as L

    class Watch(L.Callback):
        def on_test_end(self, trainer, pl_module):
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            Path(f"metrics{trainer.global_rank}.json").write_text(json.dumps(metrics))
"""


def test_metrics_are_those_of_one_process() -> None:
    """359 images in batches of 64: processes have different numbers of them, and every batch its own."""
    Path("watch.py").write_text(textwrap.dedent(WATCH))
    student = CIFARResNet(8, (4, 4, 8, 16), num_classes=10, in_channels=1).eval()
    torch.save(student.state_dict(), "student.pt")
    command = [sys.executable, "-m", "lkd", "test", "--config", "digits/kd", "--trainer.precision=32-true"]
    settings = ["--trainer.accelerator=cpu", f"--trainer.devices={PROCESSES}", "--trainer.strategy=ddp"]
    weights = ["--model.init_args.student_ckpt=student.pt", "--trainer.callbacks+=watch.Watch"]
    done = subprocess.run([*command, *settings, *weights], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = _metrics(student, load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8").eval())
    for rank in range(PROCESSES):
        assert json.loads(Path(f"metrics{rank}.json").read_text()) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def _metrics(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """What a plain loop measures on the digits' test images."""
    data = DigitsDataModule(batch_size=64, val_size=0.2)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    ours, theirs = (torch.cat([network(batch.input) for batch in batches]) for network in (student, teacher))
    target = torch.cat([batch.target for batch in batches])
    choice, teacher_choice = ours.argmax(1), theirs.argmax(1)
    pairs = {"acc": (choice, target), "teacher_acc": (teacher_choice, target), "agreement": (choice, teacher_choice)}
    shares = {f"test/{name}": (one == other).double().mean().item() for name, (one, other) in pairs.items()}
    return {"test/loss": cross_entropy(ours, target).item(), **shares}


def test_two_processes_predict_each_image_once() -> None:
    command = [sys.executable, "-m", "lkd", "predict", "--config", "digits/teacher"]
    settings = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    weights = ["--model.init_args.model_ckpt=lkd:digits_resnet8", "--trainer.enable_progress_bar=false"]
    done = subprocess.run([*command, *settings, *weights], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shares = [list(csv.DictReader(Path(f"predictions.{rank}.csv").read_text().splitlines())) for rank in (0, 1)]
    assert [len(share) for share in shares] == [180, 179]
    assert len({row["index"] for share in shares for row in share}) == 359


SPAWN = """
    import lightning as L
    import lkd
    from lkd.models import resnet8

    if __name__ == "__main__":
        module = lkd.DistillModule(resnet8(num_classes=4), resnet8(num_classes=4))
        before = module.student.conv1.weight.clone()
        data = lkd.SyntheticDataModule(4, (3, 8, 8), train_size=64, val_size=16, batch_size=16)
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, **off)
        trainer.fit(module, data)
        print("trained:", not module.student.conv1.weight.equal(before))
"""


def test_spawned_processes() -> None:
    Path("spawn.py").write_text(textwrap.dedent(SPAWN))
    done = subprocess.run([sys.executable, "spawn.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained: True" in done.stdout
