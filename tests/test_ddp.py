"""DDP with two processes (gloo): equal students, equal metrics, and a teacher that is not synchronized.

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
import yaml
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._pytree import tree_leaves

from benchmarks import warm
from lkd import DigitsDataModule
from lkd.__main__ import main
from lkd.models import CIFARResNet, load_weights, resnet8
from tests.losses.processes import PROCESSES

SPY = """
    import hashlib, json, os, sys
    from pathlib import Path
    import lightning as L
    import torch

    written = []

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(os.path.abspath(os.fsdecode(arguments[0])))
        if event in ("os.rename", "shutil.move"):
            written.append(os.path.abspath(os.fsdecode(arguments[1])))

    sys.addaudithook(watch)

    def digest(network):
        sums = hashlib.sha256()
        for tensor in network.state_dict().values():
            sums.update(tensor.numpy().tobytes())
        return sums.hexdigest()

    class Spy(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.teacher = digest(pl_module.teacher)
            if trainer.global_rank == 1:  # a broadcast would overwrite this with rank 0's statistics
                pl_module.teacher.bn1.running_mean += 1
                self.teacher = digest(pl_module.teacher)

        def on_fit_end(self, trainer, pl_module):
            seen = {
                "student": digest(pl_module.student),
                "teacher_kept": digest(pl_module.teacher) == self.teacher,
                "written": written,
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            }
            Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
"""


def test_two_processes_end_with_equal_students(tmp_path) -> None:
    Path("spy.py").write_text(textwrap.dedent(SPY))
    command = ["fit", "--config", "digits/kd", "--trainer.max_epochs=2"]
    settings = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    spy = [
        "--trainer.callbacks+=spy.Spy",
        "--teacher_cache.versions=1",
        "--trainer.enable_progress_bar=false",
        "--data.init_args.val_size=0.1",
    ]
    for done in warm.ranks(2, warm.module, "lkd", *command, *settings, *spy):
        assert done.code == 0, done.stderr[-2000:]
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
    kept = {"best.ckpt", "last.ckpt", "previous.ckpt", ".lock"}
    assert files == {"config.yaml", "run.yaml", "hparams.yaml", events} | kept
    (record,) = yaml.safe_load(next(Path("runs").rglob("run.yaml")).read_text())
    assert record["devices"]["processes"] == 2
    ours, theirs = (
        {path for path in (Path(name) for name in rank["written"]) if path.is_relative_to(tmp_path)}
        for rank in (first, second)
    )
    assert {path.name for path in ours} >= {"config.yaml", "hparams.yaml", "best.ckpt", "last.ckpt", events}
    assert [path for path in ours if path.is_relative_to(tmp_path / "lkd_cache")]  # cached logits of the teacher
    assert not theirs


WATCH = """
    import json
    from pathlib import Path
    import lightning as L

    class Watch(L.Callback):
        def on_test_end(self, trainer, pl_module):
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            Path(f"metrics{trainer.global_rank}.json").write_text(json.dumps(metrics))
"""


def test_metrics_equal_those_of_one_process() -> None:
    """With 359 images in batches of 64, processes get different numbers of images, and batches differ in size."""
    Path("watch.py").write_text(textwrap.dedent(WATCH))
    student = CIFARResNet(8, (4, 4, 8, 16), num_classes=10, in_channels=1).eval()
    torch.save(student.state_dict(), "student.pt")
    command = ["test", "--config", "digits/kd", "--trainer.precision=32-true"]
    settings = ["--trainer.accelerator=cpu", f"--trainer.devices={PROCESSES}", "--trainer.strategy=ddp"]
    weights = ["--model.init_args.student_ckpt=student.pt", "--trainer.callbacks+=watch.Watch"]
    for done in warm.ranks(PROCESSES, warm.module, "lkd", *command, *settings, *weights):
        assert done.code == 0, done.stderr[-2000:]
    expected = _metrics(student, load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8").eval())
    for rank in range(PROCESSES):
        assert json.loads(Path(f"metrics{rank}.json").read_text()) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def _metrics(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Compute the metrics on the digits' test images in a plain loop."""
    data = DigitsDataModule(batch_size=64, val_size=0.2)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    ours, theirs = (torch.cat([network(batch.input) for batch in batches]) for network in (student, teacher))
    target = torch.cat([batch.target for batch in batches])
    choice, teacher_choice = ours.argmax(1), theirs.argmax(1)
    pairs = {"acc": (choice, target), "teacher_acc": (teacher_choice, target), "agreement": (choice, teacher_choice)}
    shares = {f"test/{name}": (one == other).double().mean().item() for name, (one, other) in pairs.items()}
    apart = kl_div((ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="none").sum(1)
    filled = torch.cat((apart, apart[: -len(apart) % PROCESSES]))  # with the first images, which pad the last batches
    return {"test/loss": cross_entropy(ours, target).item(), "test/kd": 0.9 * 16 * filled.mean().item(), **shares}


MASKS = """
    import lkd
    import torch
    from torch import nn

    class Brightness(lkd.SyntheticSegmentationDataModule):
        # All pixels are labelled, because each process averages over its labelled pixels.
        def make_masks(self, split):
            made = super().make_masks(split)
            return made and (made[0], (made[0].float().mean(1) / 52).to(torch.uint8))

    def net() -> nn.Module:  # without BatchNorm, whose statistics are per process
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
"""


def test_segmentation_training_equals_that_of_one_process(monkeypatch) -> None:
    Path("masks.py").write_text(textwrap.dedent(MASKS))
    monkeypatch.syspath_prepend(Path.cwd())
    settings = ["--config=shapes/kd", "--data=masks.Brightness", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    settings += [f"--data.init_args.{size}" for size in ("train_size=71", "val_size=23", "size=16")]
    settings += ["--model.init_args.student=masks.net", "--model.init_args.optimizer=torch.optim.SGD"]
    settings += ["--model.init_args.distill_weight=0.1", "--model.init_args.optimizer.lr=0.1"]
    settings += ["--trainer.precision=32-true", "--trainer.logger=CSVLogger"]
    found = []
    for processes, batch_size in ((2, 8), (1, 16)):
        place = [f"--trainer.devices={processes}", f"--data.init_args.batch_size={batch_size}", f"--name={processes}"]
        place += ["--trainer.strategy=ddp"] if processes == 2 else []
        place += [f"--trainer.logger.save_dir=runs/{processes}"]
        for done in warm.ranks(processes, warm.module, "lkd", "fit", *settings, *place):
            assert done.code == 0, done.stderr[-2000:]
        (path,) = Path(f"runs/{processes}").rglob("last.ckpt")
        (metrics,) = Path(f"runs/{processes}").rglob("metrics.csv")
        rows = [row for row in csv.DictReader(metrics.read_text().splitlines()) if row["val/miou"]]
        scores = [[float(row[f"val/{name}"]) for name in ("miou", "acc", "teacher_miou")] for row in rows]
        found.append((torch.load(path, weights_only=True), scores))
    (ours, scores), (theirs, expected) = found
    assert ours["global_step"] == theirs["global_step"] == 6
    assert scores[0] != scores[1]
    assert scores == [pytest.approx(row, rel=1e-6) for row in expected]
    for name, tensor in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], tensor, rtol=1e-4, atol=1e-6)


BOXES = """
    import json, os, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from lkd.tasks.average_precision import MeanAP
    from lkd.tasks.metrics import MeanIoU

    rank, world, images = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), int(sys.argv[1])
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    metric, overlap = MeanAP(), MeanIoU(3)
    for number in range(images):
        start, labels = 30 * torch.rand(number % 3, 2), torch.randint(1, 3, (number % 3,))
        boxes = torch.cat((start, start + 5 + 20 * torch.rand(number % 3, 2)), 1)
        found = {"boxes": boxes + torch.randn(number % 3, 4), "scores": torch.rand(number % 3), "labels": labels}
        masks = torch.randint(3, (2, 1, 8, 8))
        if number % world == rank:
            metric.update([found], [{"boxes": boxes, "labels": labels}])
            overlap.update(*masks)
    own = len(metric.detection_box)
    found = float(metric.compute()), own, len(metric.detection_box), overlap.per_class().tolist()
    Path(f"map{world}{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("images", [5, 1])  # one of two processes has more images, or the only one
def test_metrics_of_dense_prediction_equal_those_of_one_process(images: int) -> None:
    Path("boxes.py").write_text(textwrap.dedent(BOXES))
    for processes in (1, 2):
        for done in warm.ranks(processes, warm.script, "boxes.py", str(images)):
            assert done.code == 0, done.stderr[-2000:]
    expected, _, _, per_class = json.loads(Path("map10.json").read_text())
    assert (expected > 0) == (images > 1)
    assert all(0 < one < 1 for one in per_class)
    for rank, own in enumerate((images - images // 2, images // 2)):
        assert json.loads(Path(f"map2{rank}.json").read_text()) == [pytest.approx(expected), own, own, per_class]


def test_predictions_equal_those_of_one_process(capsys) -> None:
    command = ["predict", "--config=shapes/teacher", "--model.init_args.model_ckpt=lkd:shapes_unet"]
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command += ["--data.init_args.test_size=13", "--data.init_args.batch_size=1"]  # all processes use the same kernels
    for done in warm.ranks(2, warm.module, "lkd", *command, "--trainer.devices=2", "--trainer.strategy=ddp"):
        assert done.code == 0, done.stderr[-2000:]
    assert main(command) == 0
    assert "Predictions for 13 images written" in capsys.readouterr().out
    both, alone = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (Path("runs/predict/version_0"), Path("runs/predict/version_1"))
    )
    assert len(both) == 14
    assert both == alone


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
    done = warm.Forked(warm.script, str(Path("spawn.py").resolve())).wait()
    assert done.code == 0, done.stderr[-2000:]
    assert "trained: True" in done.stdout


FAILS = """
    import os, signal
    import lightning as L

    class Fails(L.Callback):
        def __init__(self, rank: int, how: str) -> None:
            self.rank, self.how = rank, how

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 20 and trainer.global_rank == self.rank:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("as wanted")
"""


@pytest.mark.parametrize(
    ("rank", "how", "said"),
    [
        (1, "error", ["rank 1: as wanted", "rank 0: rank 1 has ended with exit code 2, so the run cannot continue"]),
        (0, "kill", ["rank 1: rank 0 has ended, so the run cannot continue"]),
    ],
)
def test_no_process_outlives_the_others(rank: int, how: str, said: list[str]) -> None:
    Path("fails.py").write_text(textwrap.dedent(FAILS))
    command = [sys.executable, "-m", "lkd", "fit", "--config", "digits/kd", "--trainer.max_epochs=100000"]
    settings = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fails = ["--trainer.callbacks+=fails.Fails", f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.how={how}"]
    # `run` returns once no process holds the pipes, so none is left.
    done = subprocess.run([*command, *settings, *fails], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    found = [line.removeprefix("lkd: error: ") for line in done.stderr.splitlines() if "lkd: error:" in line]
    # Every five seconds, Lightning checks for ended processes, reports them and kills rank 0, maybe before lkd.
    observed = rank == 1 and done.returncode < 0 and "[rank: 1] Child process" in done.stderr
    assert found == (said[:-1] if observed else said)


CHILD = """
    import time
    from lkd.cli import processes

    processes._EVERY = processes._GRACE = 0.1
    with processes.bound_to_parent():
        print("began", flush=True)
        time.sleep(600)  # like waiting for a first process that ended before the rendezvous
"""
PARENT = """
    import subprocess, sys

    child = subprocess.Popen([sys.executable, "child.py"], stdout=subprocess.PIPE)
    child.stdout.readline()
"""


def test_process_ends_with_its_parent(monkeypatch) -> None:
    Path("child.py").write_text(textwrap.dedent(CHILD))
    Path("parent.py").write_text(textwrap.dedent(PARENT))
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = subprocess.run([sys.executable, "parent.py"], capture_output=True, text=True, timeout=120)
    assert done.stderr == "lkd: error: rank 1: the process that started this one has ended\n"


SHARDED = """
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    import lkd
    from lkd.callbacks import NetworkSummary, Speed
    from lkd.models import CIFARResNet

    class Sharded(lkd.DistillModule):
        def configure_model(self):
            super().configure_model()
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def fit(name, kind, strategy, ckpt_path=None):
        torch.manual_seed(0)
        student, teacher = (CIFARResNet(8, (4, 4, 8, 8), num_classes=4) for _ in range(2))
        data = lkd.SyntheticDataModule(4, (3, 8, 8), train_size=64, val_size=16, batch_size=8)
        keep = ModelCheckpoint(name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Speed(), NetworkSummary(), keep], log_every_n_steps=1,
        )
        module = kind(student, teacher)
        before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
        trainer.fit(module, data, ckpt_path=ckpt_path)
        assert all(tensor.equal(before[key]) for key, tensor in teacher.state_dict().items())

    def shards():
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)

    fit("sharded", Sharded, shards())
    fit("resumed", Sharded, shards(), "sharded/epoch=0.ckpt")
    fit("whole", lkd.DistillModule, DDPStrategy())
"""


def test_sharded_student_equals_that_of_ddp() -> None:
    """A student sharded with FSDP2, which Lightning supports on CPUs, is saved and resumed, and equals one of DDP."""
    Path("sharded.py").write_text(textwrap.dedent(SHARDED))
    both = warm.ranks(2, warm.script, "sharded.py")
    assert [done.code for done in both] == [0, 0], both
    ways = ("sharded", "resumed", "whole")
    states = [torch.load(f"{way}/epoch=1.ckpt", weights_only=True) for way in ways]
    sharded, resumed, whole = (state["state_dict"] for state in states)
    assert not [name for name in sharded if "teacher" in name]
    for name, tensor in sharded.items():
        assert tensor.equal(resumed[name]), name
        if "running" not in name and not name.startswith("metrics"):  # DDP broadcasts the statistics of rank 0
            torch.testing.assert_close(tensor, whole[name])
    momenta = [tree_leaves(state["optimizer_states"][0]["state"]) for state in states[:2]]
    assert len(momenta[0]) > 10
    assert all(ours.equal(theirs) for ours, theirs in zip(*momenta, strict=True))
