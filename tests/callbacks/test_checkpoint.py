from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lkd.__main__ import main
from lkd.callbacks import BestCheckpoint, LastCheckpoint, StepSeed
from lkd.checkpoints.find import newest_checkpoint, run_version
from lkd.checkpoints.io import AtomicCheckpointIO, damage_of

FIT = ["fit", "--config", "digits/kd", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("settings", [{"minutes": 0.0}, {"minutes": -1.0}, {"every_n_train_steps": 0}], ids=str)
def test_times_are_positive(settings) -> None:
    with pytest.raises(ValueError, match=f"last_checkpoint.{next(iter(settings))} must be positive"):
        LastCheckpoint(**settings)


@pytest.mark.parametrize("settings", [{"minutes": 1}, {"minutes": None, "every_n_train_steps": 2}], ids=str)
def test_interval_in_time_or_steps(distill, data, trainer, tmp_path, monkeypatch, settings) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saved = []

    class Clock(StepSeed):
        def on_train_batch_end(self, trainer, *args) -> None:
            clock[0] += 40  # seconds per step; an epoch has three steps

        def on_save_checkpoint(self, trainer, *args) -> None:
            saved.append(trainer.global_step)

    last = LastCheckpoint(**settings)
    trainer(max_epochs=2, callbacks=[Clock(), last], enable_checkpointing=True).fit(distill(), data)
    assert saved == [2, 3, 5, 6]
    assert sorted(path.name for path in last.path.parent.glob("*")) == [".lock", "last.ckpt", "previous.ckpt"]


def test_steps_draw_the_same_random_numbers_in_any_state(distill, data, trainer) -> None:
    def draws(waste: bool) -> list[float]:
        drawn = []

        class Draw(StepSeed):
            def on_train_batch_start(self, *args) -> None:
                if waste:
                    torch.rand(3)
                super().on_train_batch_start(*args)
                drawn.append(torch.rand(()).item())

        trainer(max_epochs=2, callbacks=[Draw()]).fit(distill(), data)
        return drawn

    assert draws(True) == draws(False)
    assert len(set(draws(False))) == 6


def test_steps_of_processes_draw_differently() -> None:
    seed, module, drawn = StepSeed(), SimpleNamespace(device=torch.device("cpu")), set()
    for epoch, batch, rank in itertools.product(range(2), repeat=3):
        engine = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        seed.on_train_batch_start(engine, module, None, batch)  # type: ignore[arg-type]
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 8


def test_resume_starts_and_continues_a_run() -> None:
    assert main([*FIT, "--resume"]) == 0
    assert main([*FIT, "--resume", "--trainer.max_epochs=2"]) == 0
    (run,) = Path("runs/digits/kd").glob("version_*")
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    assert main(FIT) == 0  # a new run
    assert len(list(Path("runs/digits/kd").glob("version_*"))) == 2
    assert main([*FIT, "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--trainer.max_epochs=3"]) == 0
    assert len(list(Path("runs/digits/kd").glob("version_*"))) == 3  # not the last state of the run


@pytest.mark.parametrize("setting", ["--data.init_args.val_size=0", "--trainer.limit_val_batches=0"])
def test_without_validation_the_newest_checkpoint_is_the_best(setting: str, capsys) -> None:
    assert main([*FIT, setting]) == 0
    said = capsys.readouterr().out
    assert "Without validation, the most recent checkpoint is saved as the best one." in said
    best = Path("runs/digits/kd/version_0/checkpoints/best.ckpt")
    assert f"lkd test --ckpt_path {best}" in said
    first, last = (torch.load(path, weights_only=True) for path in (best, best.with_name("last.ckpt")))
    assert first["global_step"] == last["global_step"]
    assert all(torch.equal(first["state_dict"][name], value) for name, value in last["state_dict"].items())
    assert main([*FIT, setting, "--trainer.max_epochs=2", "--resume"]) == 0
    assert torch.load(best, weights_only=True)["epoch"] == 1


def test_resume_excludes_a_checkpoint(capsys) -> None:
    assert main([*FIT, "--resume", "--ckpt_path", "last"]) == 2
    assert "remove either --resume or --ckpt_path" in capsys.readouterr().err
    assert main(["test", "--resume"]) == 2


@pytest.mark.parametrize(
    ("path", "version"),
    [
        ("runs/a/version_3/checkpoints/last.ckpt", 3),
        ("runs/a/version_3/checkpoints/previous.ckpt", 3),
        ("runs/a/version_3/checkpoints/best.ckpt", None),
        ("runs/b/version_3/checkpoints/last.ckpt", None),
        ("runs/a/version_3/last.ckpt", None),
        ("runs/a/version_x/checkpoints/last.ckpt", None),
        ("last.ckpt", None),
    ],
)
def test_folder_of_a_resumed_run(path: str, version: int | None) -> None:
    assert run_version(Path(path), Path("runs/a")) == version


def test_resumed_run_replaces_its_best_checkpoint(tmp_path) -> None:
    assert BestCheckpoint(dirpath=tmp_path)._enable_version_counter is False


def test_current_score_is_restored(tmp_path) -> None:
    """The score determines the name of the checkpoint of a resumed run."""
    before, after = (BestCheckpoint(dirpath=tmp_path, monitor="val/loss") for _ in range(2))
    before.current_score = torch.tensor(0.25)
    after.load_state_dict(before.state_dict())
    assert after.current_score == 0.25
    assert after.mode == "min"


def test_newest_run_has_the_largest_number() -> None:
    for number in (2, 10, 9):
        folder = Path(f"a/version_{number}/checkpoints")
        folder.mkdir(parents=True)
        torch.save({}, folder / "last.ckpt")
        os.utime(folder / "last.ckpt", (number == 2, number == 2))  # even if copying changed the times
    assert newest_checkpoint(Path("a"), "last") == Path("a/version_10/checkpoints/last.ckpt")


def test_checkpoints_have_default_file_permissions(tmp_path) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.ckpt").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b"]  # noqa: PTH208


def test_flipped_bits_are_detected(tmp_path) -> None:
    """Undetected bits are those without effect: times, and unused fields of the zip format."""
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.arange(40.0)}}, path)
    content = path.read_bytes()
    wanted = torch.load(path, weights_only=True)["state_dict"]["a"]
    undetected = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if not damage_of(path):
            undetected += 1
            assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["a"], wanted), position
    assert 0 < undetected < len(content) / 2


def test_corrupt_file_is_rejected_by_the_trainer(tmp_path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.arange(4000.0)}, path)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match="is corrupt"):
        AtomicCheckpointIO().load_checkpoint(path)
