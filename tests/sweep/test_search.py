"""Uninterrupted searches: results, pruning, failed trials and error messages."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import lightning as L
import optuna
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lkd.__main__ import main
from tests.sweep.conftest import FOLDER, table

T, W = "model.init_args.criterion.init_args.temperature", "model.init_args.distill_weight"


def test_results_of_a_search(sweep) -> None:
    code, output = sweep("--trials=2", "--sampler=random")
    assert code == 0
    lines = [line for line in output.splitlines() if line.startswith("trial ")]
    assert len(lines) == 2
    assert "temperature " in lines[0]
    assert "distill_weight " in lines[0]
    rows = table()
    assert [row["state"] for row in rows] == ["complete"] * 2
    best = max(rows, key=lambda row: float(row["value"]))  # the first one if several are equal
    for row in rows:
        run = FOLDER / f"trial_{int(row['trial']):04}" / "version_0"
        model = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
        assert model["criterion"]["init_args"]["temperature"] == float(row[T])
        assert model["distill_weight"] == float(row[W])
        points = EventAccumulator(str(run)).Reload().Scalars("val/acc")
        assert max(point.value for point in points) == pytest.approx(float(row["value"]))
        assert "accuracy on the validation images" in (run.parent / "log.txt").read_text()
    page = (FOLDER / "study.html").read_text()
    assert page.count("<svg") >= 2
    assert not re.findall(r"<(?:script|link|img|iframe)|@import|url\((?!#)", page)  # no external resources
    config = yaml.safe_load((FOLDER / "best.yaml").read_text())
    assert not {"config", "ckpt_path"} & set(config)
    assert config["model"]["init_args"]["distill_weight"] == float(best[W])
    assert main(["fit", "--config", str(FOLDER / "best.yaml")]) == 0
    points = EventAccumulator(str(FOLDER / "best" / "version_0")).Reload().Scalars("val/acc")
    assert max(point.value for point in points) == pytest.approx(float(best["value"]))  # reproduces the trial


class Scores(L.Callback):
    """Log the trial's `distill_weight` as its validation score."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("val/score", float(pl_module.distill_weight))


def _weights(*values: float) -> str:
    return f"--space.{W}={list(values)}"


def test_segmentation(capsys) -> None:
    """Trials are compared by mean IoU instead of accuracy."""
    sizes = ["train_size=16", "size=16", "batch_size=8", "val_size=8"]
    short = [f"--data.init_args.{size}" for size in sizes] + ["--trainer.max_epochs=1"]
    space = "--space=sweep/temperature_weight_segmentation"
    assert main(["sweep", "--config=shapes/kd", space, "--trials=1", *short]) == 0
    assert "maximizing val/miou" in capsys.readouterr().out
    (row,) = table(Path("runs/shapes/kd/sweep"))
    points = EventAccumulator("runs/shapes/kd/sweep/trial_0000/version_0").Reload().Scalars("val/miou")
    assert points[0].value == pytest.approx(float(row["value"]))


def test_poor_trials_are_pruned(sweep, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["lkd.sweep.study"], "MedianPruner", _early_pruner)
    args = [f"--trainer.callbacks+={__name__}.Scores", "--monitor=val/score", "--pruner=median", "--sampler=grid"]
    code, output = sweep(*args, f"--space.{T}=[4.0]", _weights(0.1, 0.2, 0.3, 0.4))
    assert code == 0, output
    rows = {float(row[W]): row for row in table()}
    best = max(float(row["value"]) for row in rows.values() if row["state"] == "complete")
    pruned = [row for row in rows.values() if row["state"] == "pruned"]
    assert best == pytest.approx(0.4)
    assert pruned
    for row in pruned:
        assert "pruned at epoch 0" in row["reason"]
        assert row["value"] == ""
    assert "4 trials: " in output
    assert "Callback" not in (FOLDER / "best.yaml").read_text().replace("callbacks", "")


def _early_pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner(n_startup_trials=1)


def test_lowest_loss_is_best(sweep) -> None:
    code, output = sweep("--monitor=val/loss", "--trials=2", "--trainer.max_epochs=1")
    assert code == 0
    assert "minimizing val/loss" in output
    lowest = min(float(row["value"]) for row in table())
    assert f"val/loss {lowest:.5g}" in output.split("Best: ")[1]


def test_failed_trial_is_recorded_and_the_search_continues(sweep) -> None:
    code, output = sweep("--sampler=grid", f"--space.{T}=[4.0]", _weights(-1.0, 0.5, 0.9), "--trainer.max_epochs=1")
    assert code == 0
    failed = [row for row in table() if row["state"] == "failed"]
    assert [float(row[W]) for row in failed] == [-1.0]
    assert "distill_weight" in failed[0]["reason"]
    assert "2 complete" in output
    assert "1 failed" in output
    assert "Traceback" in (FOLDER / f"trial_{int(failed[0]['trial']):04}" / "log.txt").read_text()


def test_name_of_another_search_is_rejected(sweep) -> None:
    short = ["--trials=1", "--trainer.limit_train_batches=1"]
    assert sweep(*short, "--trainer.max_epochs=1")[0] == 0
    code, output = sweep(*short)
    assert code == 2
    assert "was started with trainer.max_epochs 1 (now 2); restore these settings, give another --study NAME" in output
    assert sweep(*short, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=5")[0] == 0  # does not affect results
    assert "cannot monitor 'val/accc': no such metric" in sweep(*short, "--study=other", "--monitor=val/accc")[1]


def test_repeated_failure_ends_the_search(sweep) -> None:
    code, output = sweep("--trials=20", "--trainer.max_epochs=1", "--model.init_args.optimizer.init_args.lr=1e30")
    assert code == 2
    assert "3 trials failed in the same way: the loss is not finite" in output
    assert len(table()) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trails=3"], "lkd sweep has no option --trails; did you mean --trials?"),
        (["--trials=0"], "--trials must be an integer of at least 1, got '0'"),
        (["--trials=many"], "--trials must be an integer"),
        (["--sampler=gird"], "--sampler must be one of tpe, random, grid, got 'gird'; did you mean 'grid'?"),
        (["--pruner=medain"], "did you mean 'median'?"),
        (["--study=a/b"], "--study must be a folder name"),
        (["--study=version_0"], "--study must be a folder name"),
        (["--resume"], "lkd sweep does not accept --resume"),
        (["--space=spice.yaml"], "config 'spice.yaml' not found; lkd provides sweep/temperature_weight.yaml, sweep/"),
        (["--space.model.init_args.distill_wieght=[1, 2]"], "did you mean 'model.init_args.distill_weight'?"),
        ([f"--space.{T}=[1, warm]"], "criterion"),
        ([f"--{W}=0.3"], f"{W} is both in the search space and set on the command line"),
        (["--sampler=grid"], f"a grid requires a finite number of values of {T}"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"], "remove trainer.logger or set it to false"),
        (["--trainer.enable_checkpointing=false"], "none would be saved"),
        (["--checkpoint.save_top_k=0"], "none would be saved"),
        (["--trainer.fast_dev_run=true"], "none would be saved"),
        (["--checkpoint.dirpath=here"], "remove checkpoint.dirpath"),
        (["--trainer.devices=2"], "trains each trial in one process"),
        (["--storage=nodb://x"], "--storage nodb://x cannot be opened"),
        (["--model.init_args.studnet=3"], "student"),
    ],
)
def test_errors_are_reported_before_the_first_trial(sweep, args: list[str], message: str) -> None:
    code, text = sweep(*args)
    assert code == 2
    assert message in " ".join(text.split())
    assert text.count("\n") == 1
    assert not list(Path("runs").rglob("trial_*")) if Path("runs").exists() else True


@pytest.mark.parametrize(("command", "name"), [("sweep", "optuna"), ("compare", "matplotlib")])
def test_missing_optional_package_is_reported(command: str, name: str, monkeypatch, capsys) -> None:
    def distribution(package: str) -> str:
        if package == name:
            raise PackageNotFoundError(package)
        return package

    monkeypatch.setattr("lkd.cli.early_checks.distribution", distribution)
    assert main([command, "runs"]) == 2
    message = f"lkd {command} requires {name}, which is not installed; run pip install 'lightning-kd[{command}]'"
    assert message in capsys.readouterr().err


def test_metric_that_is_not_logged_is_rejected(sweep) -> None:
    """If the loss does not train the logits, accuracy is not logged; the distillation loss can be used instead."""
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", _weights(0.5, 1.0)]
    features = ["--config=methods/backbone_kd", *short]
    code, output = sweep("--trials=3", *features, space=False)
    assert code == 2
    assert "val/acc is not logged because the loss does not train the logits; use --monitor val/backbonekd" in output
    code, output = sweep("--trials=1", *features, "--study=other", "--monitor=val/backbonekd", space=False)
    assert code == 0
    assert "minimizing val/backbonekd" in output
