"""Changes by the user before a run is resumed, and the messages and files that result."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import fsspec
import lightning as L
import numpy as np
import pytest
import torch
import yaml

from benchmarks.lives import curves
from lkd.__main__ import main
from lkd.callbacks import LastCheckpoint

FIT = ["fit", "--config", "digits/kd", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=7"]
RUN = Path("runs/digits/kd/version_0")


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Return a folder with a run of two epochs."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LKD_CACHE", str(folder / "lkd_cache"))
        assert main([*FIT, "--resume", "--trainer.max_epochs=2"]) == 0
    return folder


@pytest.fixture
def fit(begun, tmp_path, capfd):
    """Return a function that resumes the run for a third epoch and returns exit code and output."""
    shutil.copytree(begun / "runs", tmp_path / "runs")

    def resume(*args: str, max_epochs: int = 3, how: str = "--resume") -> tuple[int, str]:
        code = main([*FIT, how, f"--trainer.max_epochs={max_epochs}", *args])
        out, err = capfd.readouterr()
        return code, " ".join((out + err).split())

    return resume


def _best() -> dict[str, object]:
    states = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["callbacks"].values()
    return next(state for state in states if state.get("monitor") == "val/acc")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student.init_args.depth=14", "the checkpoint does not match this DistillModule"),
        ("optimizer=torch.optim.Adam", "was started with model.init_args.optimizer.class_path torch.optim.SGD (now"),
        ("lr_scheduler=null", "was started with model.init_args.lr_scheduler lkd.schedules.CosineDecay"),
        ("lr_scheduler_interval=step", "was started with model.init_args.lr_scheduler_interval epoch (now step)"),
    ],
)
def test_rejected_run_is_not_modified(fit, setting: str, message: str) -> None:
    before, points = (RUN / "config.yaml").read_text(), curves(RUN)
    code, text = fit(f"--model.init_args.{setting}", how="--ckpt_path=last")
    assert code == 2
    assert message in text
    assert (RUN / "config.yaml").read_text() == before
    assert curves(RUN) == points
    assert fit()[0] == 0


def test_second_process_is_rejected_before_it_changes_files(fit, monkeypatch) -> None:
    def taken(*_: object) -> None:  # the lock of the same process would have no effect
        raise BlockingIOError

    before, points = (RUN / "config.yaml").read_text(), curves(RUN)
    monkeypatch.setattr(fcntl, "lockf", taken)
    code, text = fit("--model.init_args.distill_weight=0.123", how="--ckpt_path=last")
    assert code == 2
    assert "another process is training the run" in text
    assert (RUN / "config.yaml").read_text() == before
    assert curves(RUN) == points


def _settings_warnings(warned) -> list[str]:
    return [str(warning.message) for warning in warned if "started with different settings" in str(warning.message)]


def test_changed_settings_are_reported(fit, recwarn) -> None:
    others = ["--model.init_args.optimizer.init_args.lr=0.0001", "--seed_everything=7"]
    assert fit(*others, how="--ckpt_path=last")[0] == 0
    assert _settings_warnings(recwarn) == [
        "this run was started with different settings: seed_everything 0 (now 7), model.init_args.optimizer.init_args."
        "lr 0.1 (now 0.0001); optimizer and schedule keep their original values"
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed_everything=7", "seed_everything 0 (now 7)"),
        ("data.init_args.batch_size=32", "data.init_args.batch_size 64 (now 32)"),
        ("model.init_args.student.init_args.depth=14", "model.init_args.student.init_args.depth 8 (now 14)"),
        ("model.init_args.criterion.init_args.temperature=2", "criterion.init_args.temperature 4.0 (now 2.0)"),
        ("model.init_args.optimizer.init_args.lr=0.2", "model.init_args.optimizer.init_args.lr 0.1 (now 0.2)"),
        ("model.init_args.teacher_ckpt=runs/digits/kd", "model.init_args.teacher_ckpt lkd:digits_resnet8 (now runs/"),
    ],
)
def test_other_runs_are_not_resumed(fit, setting: str, message: str) -> None:
    before, points = (RUN / "config.yaml").read_text(), curves(RUN)
    code, text = fit(f"--{setting}")
    assert code == 2
    assert f"--resume found {RUN}/checkpoints/last.ckpt, whose run has different settings: " in text
    assert message in text
    assert "set a different --name" in text
    assert (RUN / "config.yaml").read_text() == before
    assert curves(RUN) == points


def test_settings_that_may_differ(fit) -> None:
    csv = ["--trainer.logger=CSVLogger", "--trainer.logger.init_args.save_dir=csv"]
    assert fit("--data.init_args.num_workers=0", "--trainer.limit_val_batches=2", *csv)[0] == 0
    assert sorted(path.name for path in RUN.parent.iterdir()) == ["version_0"]
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 3


def test_unchanged_settings_cause_no_warning(fit, recwarn) -> None:
    assert fit("--trainer.log_every_n_steps=3")[0] == 0
    assert not _settings_warnings(recwarn)
    assert yaml.safe_load((RUN / "config.yaml").read_text())["ckpt_path"] is None


@pytest.mark.parametrize("way", ["moved", "spelt otherwise", "on another disk"])
def test_best_checkpoint_is_kept(fit, tmp_path, way: str) -> None:
    wanted = _best()["best_model_score"]
    args = ["--data.init_args.mean=[30.0]"]  # with these statistics, the metrics do not improve
    if way == "spelt otherwise":
        args.append(f"--trainer.default_root_dir={tmp_path}/runs")
    if way == "moved":
        Path("runs").rename("runs2")
        args.append("--trainer.default_root_dir=runs2")
    if way == "on another disk":
        RUN.rename("disk")
        RUN.symlink_to(Path("disk").absolute())
    assert fit(*args, how="--ckpt_path=last")[0] == 0
    if way == "moved":
        Path("runs2").rename("runs")
    assert sorted(path.name for path in RUN.parent.iterdir()) == ["version_0"]
    assert _best()["best_model_score"] == wanted
    assert torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)["epoch"] < 2


def test_runs_without_checkpoint_are_skipped(fit) -> None:
    (RUN.parent / "version_10").mkdir()
    (RUN.parent / "version_10/config.yaml").touch()
    code, text = fit()
    assert code == 0
    assert f"lkd: resuming from {RUN}/checkpoints/last.ckpt, after 2 epochs and 34 steps" in text
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 3


def test_resume_starts_a_new_run(fit) -> None:
    code, text = fit("--name=other", "--trainer.limit_train_batches=1", max_epochs=1)
    assert code == 0
    assert "lkd: no checkpoint found in runs/other; starting a new run" in text


def test_name_of_a_run(capsys) -> None:
    assert main([*FIT, "--name=mine/first", "--trainer.fast_dev_run=true"]) == 0
    Path("name.yaml").write_text("name: mine/second")
    short = ["--config=name.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert main([*FIT, *short]) == 0
    capsys.readouterr()
    assert main([*FIT, *short, "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert [str(path) for path in Path("runs").rglob("version_*")] == ["runs/mine/second/version_0"]
    assert main([*FIT, "--name=../elsewhere"]) == 2
    assert "name must be a relative path such as 'baseline'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ckpt_path=best"], "remove either --resume or --ckpt_path"),
    ],
)
def test_options_that_exclude_resume(fit, args: list[str], message: str) -> None:
    code, text = fit(*args)
    assert code == 2
    assert message in text


def test_max_epochs_below_completed_epochs(fit) -> None:
    code, text = fit(max_epochs=1)
    assert code == 2
    assert "this run has already completed 2 epochs; set --trainer.max_epochs above 2 to continue" in text


def test_resume_requires_fit_and_a_name(capsys) -> None:
    assert main(["test", "--resume"]) == 2
    assert "--resume is only available in lkd fit" in capsys.readouterr().err
    assert main(["fit", "--resume"]) == 2
    assert "--resume requires the --config of the run" in capsys.readouterr().err


class Odd(L.Callback):
    """A callback whose state is not a plain object."""

    def state_dict(self) -> dict[str, object]:
        return {"x": np.array([1.5])}


def test_state_that_requires_code_causes_a_warning(distill, data, trainer, recwarn) -> None:
    trainer(max_epochs=1, callbacks=[Odd(), LastCheckpoint()], enable_checkpointing=True).fit(distill(), data)
    messages = [str(warning.message) for warning in recwarn if "--weights_only false" in str(warning.message)]
    assert len(messages) == 1
    assert "numpy" in messages[0]


def test_remote_folder(distill, data, trainer) -> None:
    root = "memory://runs"
    engine = trainer(max_epochs=1, callbacks=[LastCheckpoint()], enable_checkpointing=True, default_root_dir=root)
    engine.fit(distill(), data)
    files = fsspec.filesystem("memory").glob("/runs/**/*.ckpt")
    assert [Path(file).name for file in files] == ["last.ckpt"]
    assert not Path("memory:").exists()
