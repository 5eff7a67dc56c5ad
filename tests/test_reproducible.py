"""Runs with the same seed are bitwise identical, and record the versions and data that determine the result."""

from __future__ import annotations

import subprocess
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import warm
from lkd import ImageFolderDataModule, SyntheticDataModule
from lkd.__main__ import main
from lkd.callbacks import RunRecord
from lkd.callbacks.record import _begun, _revision
from lkd.datamodules.files import read_tree

EVERYTHING = """
data:
  init_args:
    augment:
      - {class_path: lkd.datamodules.RandomCrop, init_args: {padding: 1}}
      - {class_path: lkd.datamodules.RandomErasing, init_args: {p: 0.5}}
    mix: {class_path: lkd.datamodules.Mixup, init_args: {alpha: 0.2}}
trainer: {max_epochs: 2, limit_train_batches: 6, accelerator: cpu, enable_progress_bar: false}
"""
FIT = [f"--config={name}" for name in ("data/digits", "pairs/digits", "methods/crd", "everything.yaml")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run with all features enabled."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MY_TOKEN", "kept to myself")
        Path("everything.yaml").write_text(EVERYTHING)
        assert main(["fit", *FIT]) == 0
    (found,) = folder.glob("runs/*/version_0")
    return found


def _same(one: Path, other: Path) -> None:
    """Check that checkpoints, including optimizers and metrics, and logged values are bitwise equal."""
    for name in ("best.ckpt", "last.ckpt"):
        states = [torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other)]
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
            leaves = [tree_leaves(state[part]) for state in states]
            for ours, theirs in zip(*leaves, strict=True):
                assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, (name, part)
    ours, theirs = (_curves(run) for run in (one, other))
    assert {"train/loss", "train/crd", "val/acc", "val/agreement"} <= set(ours)
    assert ours == theirs


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), {"scalars": 0})
    events.Reload()
    names = set(events.Tags()["scalars"]) - {"train/images_per_s"}
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}


def test_another_process_gives_identical_results(run: Path) -> None:
    Path("everything.yaml").write_text(EVERYTHING)
    done = warm.Forked(warm.module, "lkd", "fit", *FIT).wait()
    assert done.code == 0, done.stderr[-2000:]
    (again,) = Path().glob("runs/*/version_0")
    _same(run, again)


def test_saved_config_gives_identical_results(run: Path, recwarn) -> None:
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    (again,) = Path().glob("runs/*/version_0")
    _same(run, again)
    assert not [warning for warning in recwarn if "was started with" in str(warning.message)]


def test_another_seed_gives_a_different_student(run: Path) -> None:
    assert main(["fit", "--config", str(run / "config.yaml"), "--seed_everything=1"]) == 0
    (other,) = Path().glob("runs/*/version_0")
    with pytest.raises(AssertionError, match="state_dict"):
        _same(run, other)


def test_record(run: Path) -> None:
    text = (run / "run.yaml").read_text()
    assert "kept to myself" not in text
    (record,) = yaml.safe_load(text)
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) >= {"lkd", "python", "torchvision", "lightning", "torchmetrics", "numpy", "PIL"}
    assert record["command"].startswith("lkd fit --config=")
    assert record["folder"] == str(run.parent.parent.parent)
    assert record["devices"]["processes"] == 1
    assert record["devices"]["threads"] == torch.get_num_threads()
    assert record["seeds"] == {"run": 0, "data": 0, "split": 0}
    assert {name: record["images"][name] for name in ("train", "val")} == {"train": 1150, "val": 288}
    assert len(record["images"]["contents"]) == 32


def test_revision(monkeypatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    assert _revision(Path()) is None  # not a repository
    Path("kept.txt").write_text("one")
    for command in (["init", "-q"], ["add", "kept.txt"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    Path("runs").mkdir()
    Path("runs/new.txt").write_text("what a run leaves makes nothing dirty")
    assert _revision(Path()) == commit
    Path("kept.txt").write_text("two")
    assert _revision(Path()) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert _revision(Path()) is None  # git is missing


@pytest.mark.parametrize("how", ["run again", "taken up"])
def test_changes_are_reported(run: Path, recwarn, how: str) -> None:
    place = Path("earlier", "version_0")
    place.mkdir(parents=True)
    (place / "config.yaml").write_text((run / "config.yaml").read_text())
    (place / "checkpoints").mkdir()
    (place / "checkpoints/last.ckpt").write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    (record,) = yaml.safe_load((run / "run.yaml").read_text())
    now = record["versions"]["torch"]
    record["versions"]["torch"], record["images"]["contents"] = "1.0", "others"
    (place / "run.yaml").write_text(yaml.safe_dump([record]))
    which = [f"--config={place}/config.yaml"] if how == "run again" else [f"--ckpt_path={place}/checkpoints/last.ckpt"]
    assert main(["fit", *which, "--trainer.max_epochs=3", "--trainer.logger=false"]) == 0
    messages = [str(warning.message) for warning in recwarn if "was started with" in str(warning.message)]
    assert messages == [
        f"this run was started with torch 1.0 (now {now}) and different training images; "
        "results may not be bitwise identical"
    ]


class Theirs(L.LightningDataModule):
    """A data module without lkd's identification of its images."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(8, 3, 8, 8), torch.arange(8) % 4), batch_size=4)


def test_second_fit_appends_to_the_record(distill, data, trainer, tmp_path: Path, recwarn) -> None:
    for images in (data, Theirs()):
        trainer(max_epochs=1, callbacks=[RunRecord(["fit"])]).fit(distill(), images)
    first, second = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert first["images"]["train"] == 48
    assert second["images"] == {"contents": "unknown"}
    assert second["seeds"] == {"run": first["seeds"]["run"], "data": "unknown", "split": "unknown"}
    assert not [warning for warning in recwarn if "was started with" in str(warning.message)]


def test_runs_of_one_folder_are_not_compared(distill, data, trainer, tmp_path: Path, recwarn) -> None:
    """Loggers may share a folder, so an existing record belongs to another run unless that run is resumed."""
    root = tmp_path / "not/there/yet"
    for images in (data, SyntheticDataModule(4, (3, 8, 8), train_size=32, val_size=0.25, batch_size=16)):
        trainer(max_epochs=1, callbacks=[RunRecord(["fit"])], default_root_dir=root).fit(distill(), images)
    first, second = yaml.safe_load((root / "run.yaml").read_text())
    assert first["images"]["contents"] != second["images"]["contents"]
    assert not [warning for warning in recwarn if "was started with" in str(warning.message)]


@pytest.mark.parametrize("text", ["", "{", "- 1", "a: b", "- versions"])
def test_unreadable_records_are_ignored(run: Path, recwarn, text: str) -> None:
    Path("run.yaml").write_text(text)
    assert _begun([Path("none.yaml"), Path("run.yaml")]) is None
    assert _begun([Path("run.yaml"), run / "run.yaml"])["seeds"]["run"] == 0


def _folder(root: Path, level: int = 0) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(4):
                path = root / split / name / f"{number}.bmp"  # the file size does not depend on the pixels
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), number + level, np.uint8)).save(path)
    return root


def test_copied_images_have_the_same_contents(tmp_path: Path) -> None:
    def contents(root: Path, limit: int, **settings) -> str | None:
        data = ImageFolderDataModule(root, image_size=8, val_size=2, resident_limit=limit, augment=[], **settings)
        data.setup("fit")
        return data.datasets["train"].contents()

    ours, copy, other = _folder(tmp_path / "a"), _folder(tmp_path / "b"), _folder(tmp_path / "c", level=1)
    assert contents(ours, 2**20) == contents(copy, 2**20) != contents(other, 2**20)
    assert contents(ours, 0) == contents(copy, 0) != contents(ours, 2**20)
    assert contents(ours, 2**20) != contents(ours, 2**20, split_seed=1)
    (other / "train/cat/0.bmp").write_bytes((other / "train/cat/0.bmp").read_bytes() + b"\0")
    assert contents(ours, 0) != contents(other, 0)
    assert len(read_tree(ours / "train", ["cat", "dog"]).contents()) == 32
