"""Two processes (gloo): equal students, equal metrics, a teacher that stays out of it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

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
    files = {path.name for path in Path("runs").rglob("*") if path.is_file()}
    (events,) = (name for name in files if name.startswith("events."))
    assert files == {"config.yaml", "run.yaml", "hparams.yaml", "best.ckpt", "last.ckpt", events}
    (record,) = yaml.safe_load(next(Path("runs").rglob("run.yaml")).read_text())
    assert record["devices"]["processes"] == 2


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


FAILS = """
    import os, signal
    import lightning as L

    class Fails(L.Callback):
        def __init__(self, rank: int, how: str) -> None:
            self.rank, self.how = rank, how
            if how == "before they meet" and os.environ.get("LOCAL_RANK"):
                os.kill(os.getppid(), signal.SIGKILL)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 20 and trainer.global_rank == self.rank:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("as wanted")
"""


@pytest.mark.parametrize(
    ("rank", "how", "said"),
    [
        (1, "error", ["rank 1: as wanted", "rank 0: rank 1 has ended with exit code 2, so the run cannot go on"]),
        (1, "kill", ["rank 0: rank 1 has ended, killed by SIGKILL, so the run cannot go on"]),
        (0, "kill", ["rank 1: rank 0 has ended, so the run cannot go on"]),
        (0, "before they meet", ["rank 1: the process that started this one has ended"]),
    ],
)
def test_none_outlives_the_others(rank: int, how: str, said: list[str]) -> None:
    Path("fails.py").write_text(textwrap.dedent(FAILS))
    command = [sys.executable, "-m", "lkd", "fit", "--config", "digits/kd", "--trainer.max_epochs=100000"]
    settings = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fails = ["--trainer.callbacks+=fails.Fails", f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.how={how}"]
    # The pipes are at their end when no process holds them: none is left.
    done = subprocess.run([*command, *settings, *fails], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert [line.removeprefix("lkd: error: ") for line in done.stderr.splitlines() if "lkd: error:" in line] == said
