"""Loggers other than TensorBoard get the same values; runs without a logger lose nothing."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lkd.__main__ import main
from lkd.cli.errors import explain

FIT = ["fit", "--config=digits/kd", "--trainer.max_epochs=2", "--trainer.limit_train_batches=4"]
FIT += ["--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
Points = dict[tuple[str, int], float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a folder with the same run for each logger, for several, and for none."""
    import wandb

    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        assert main(FIT) == 0
        for name in ("csv", "mlflow", "wandb"):
            assert main([*FIT, f"--config=loggers/{name}"]) == 0
        wandb.finish()  # as at the end of a process
        several = "[{class_path: TensorBoardLogger, init_args: {save_dir: both}}, {class_path: CSVLogger, "
        several += "init_args: {save_dir: both}}]"
        assert main([*FIT, f"--trainer.logger={several}"]) == 0
        assert main([*FIT, "--trainer.logger=false", "--trainer.default_root_dir=none"]) == 0
    return folder


def _only(runs: Path, name: str, part: str) -> Path:
    (path,) = [path for path in runs.rglob(name) if part in path.parts]
    return path


def _tensorboard(folder: Path) -> Points:
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if _is_compared(name)]
    return {(name, point.step): point.value for name in names for point in events.Scalars(name)}


def _is_compared(name: str) -> bool:
    return "/" in name and not name.startswith("final/") and "images_per_s" not in name


def _csv(path: Path) -> Points:
    rows = csv.DictReader(path.read_text().splitlines())
    cells = [(name, int(row["step"]), cell) for row in rows for name, cell in row.items() if cell]
    return {(name, step): float(cell) for name, step, cell in cells if _is_compared(name)}


def _mlflow(path: Path) -> tuple[Points, dict[str, str]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name("lkd")
    (run,) = client.search_runs([experiment.experiment_id])
    names = [name for name in run.data.metrics if _is_compared(name)]
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {(name, p.step): p.value for name, history in histories.items() for p in history}, run.data.params


def _wandb(path: Path) -> tuple[Points, dict[str, object]]:
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = {}
    config: dict[str, object] = {}
    for part in _parts(path.read_bytes()):
        record = Record.FromString(part)
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        points |= {(name, row["trainer/global_step"]): row[name] for name in row if _is_compared(name)}
    return {place: value for place, value in points.items() if not place[0].startswith("trainer/")}, config


def _parts(content: bytes) -> list[bytes]:
    """Return the records of a file in LevelDB's log format, which the wandb package writes but cannot read."""
    records, place, whole = [], 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            records.append(whole)
            whole = b""
    return records


@pytest.fixture(scope="module")
def expected(runs: Path) -> Points:
    points = _tensorboard(runs / "runs/digits/kd/version_0")
    names = {"train/loss", "train/hard", "train/kd", "train/acc", "val/acc", "val/loss", "val/teacher_acc"}
    assert names <= {name for name, _ in points}
    assert [step for name, step in points if name == "val/acc"] == [3, 7]
    return points


def test_csv_values(runs: Path, expected: Points) -> None:
    assert _csv(_only(runs, "metrics.csv", "csv")) == pytest.approx(expected, rel=1e-6)
    assert (
        yaml.safe_load((_only(runs, "metrics.csv", "csv").with_name("hparams.yaml")).read_text())["distill_weight"]
        == 0.9
    )


def test_mlflow_values(runs: Path, expected: Points) -> None:
    points, settings = _mlflow(runs / "runs/mlflow.db")
    assert points == pytest.approx(expected, rel=1e-6)
    assert settings["distill_weight"] == "0.9"
    assert settings["student/init_args/depth"] == "8"


def test_wandb_values(runs: Path, expected: Points) -> None:
    (file,) = (runs / "runs/wandb").glob("offline-run-*/*.wandb")
    points, settings = _wandb(file)
    assert points == pytest.approx(expected, rel=1e-6)
    assert settings["distill_weight"] == 0.9


def test_values_of_several_loggers(runs: Path, expected: Points) -> None:
    assert _tensorboard(next((runs / "both").rglob("events.*")).parent) == pytest.approx(expected)
    assert _csv(next((runs / "both").rglob("metrics.csv"))) == pytest.approx(expected, rel=1e-6)


PLACES = ["runs/kd+csv", "runs/kd+mlflow", "runs/kd+wandb", "runs/digits/kd/version_1", "none"]


@pytest.mark.parametrize("place", PLACES)
def test_config_record_and_checkpoints_share_a_folder(runs: Path, place: str, monkeypatch, capsys) -> None:
    (best,) = (runs / place).rglob("best.ckpt")
    folder = best.parent.parent
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["class_path"] == "lkd.DistillModule"
    assert len(yaml.safe_load((folder / "run.yaml").read_text())) == 1
    monkeypatch.chdir(runs)
    assert main(["test", f"--ckpt_path={best}", "--trainer.enable_progress_bar=false"]) == 0
    assert "test/acc" in capsys.readouterr().out


def test_resume_with_another_logger(runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(runs)
    assert main([*FIT, "--config=loggers/csv", "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_all_files_are_in_the_run_folders(runs: Path) -> None:
    assert {path.name for path in runs.iterdir()} <= {"runs", "both", "none", "mlruns"}


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_missing_logger(package: str, monkeypatch, capsys) -> None:
    module = __import__(f"lightning.pytorch.loggers.{package}", fromlist=["x"])
    name = {"wandb": "_WANDB_AVAILABLE", "mlflow": "_MLFLOW_AVAILABLE"}[package]
    monkeypatch.setattr(module, name, type(getattr(module, name))("surely_not_there>=1.0"))
    assert main([*FIT, f"--config=loggers/{package}"]) == 2
    assert "surely_not_there" in capsys.readouterr().err
    text = f"Requirement '{package}>=1.0' not met. HINT: Try running `pip install -U '{package}'`"
    assert explain(ModuleNotFoundError(text)) == (
        f"the logger requires {package}, which is not installed; run pip install 'lightning-kd[loggers]'"
    )


def test_error_of_a_logger(capsys, monkeypatch) -> None:
    from wandb.errors import UsageError

    def refuses(*_: object) -> None:
        raise UsageError("No API key configured.")

    monkeypatch.delenv("LKD_DEBUG", raising=False)
    monkeypatch.setattr("lkd.cli.main.LkdCLI", refuses)
    assert main(FIT) == 2
    assert capsys.readouterr().err == "lkd: error: No API key configured.\n"
