"""`lkd fit --seeds`: each run equals a single run with its seed; interruptions, failures and errors."""

from __future__ import annotations

import csv
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lkd import DistillModule
from lkd.__main__ import main
from lkd.cli import seeds

FIT = ["fit", "--config", "digits/kd", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
FIT += ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1"]
RUNS = Path("runs/digits/kd")


def _checkpoint(version: int | str) -> dict:
    return torch.load(RUNS / f"version_{version}" / "checkpoints" / "last.ckpt", weights_only=True)


def _score(checkpoint: dict) -> float:
    (score,) = [float(state["best_model_score"]) for state in checkpoint["callbacks"].values() if state.get("monitor")]
    return score


def _same(one: dict, other: dict) -> bool:
    names = one["state_dict"].keys()
    return names == other["state_dict"].keys() and all(
        torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in names
    )


@pytest.fixture
def begun(monkeypatch) -> list[list[str]]:
    """Return the recorded arguments of each run; runs are trained in this process, which is faster."""
    calls: list[list[str]] = []

    def fit(args) -> int:
        calls.append([arg for arg in args if arg.startswith(("--seed_everything", "--ckpt_path"))])
        return main(["fit", *args])

    monkeypatch.setattr(seeds, "_fit", fit)
    return calls


def test_each_run_equals_a_single_run_with_its_seed(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # each run has its own process
    assert main([*FIT, "--seeds=7,"]) == 0
    assert main([*FIT, "--seed_everything=7"]) == 0
    assert _same(_checkpoint(0), _checkpoint(1))
    assert _score(_checkpoint(0)) == _score(_checkpoint(1))


def test_seed_is_recorded_and_modules_are_loaded() -> None:
    assert main([*FIT, "--seed_everything=7"]) == 0
    assert yaml.safe_load((RUNS / "version_0" / "hparams.yaml").read_text())["seed_everything"] == 7
    checkpoint = _checkpoint(0)
    assert checkpoint["lkd"]["seed_everything"] == 7
    assert checkpoint["lkd"]["class_names"] == list("0123456789")
    assert "seed_everything" not in checkpoint["hyper_parameters"]
    path = RUNS / "version_0" / "checkpoints" / "last.ckpt"
    assert DistillModule.load_from_checkpoint(path).hparams.distill_weight == 0.9
    events = next((RUNS / "version_0").glob("events.*"))
    plugins = [
        value.metadata.plugin_data.content
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    ]
    assert [b"seed_everything" in plugin for plugin in plugins] == [True]


def test_resume_continues_interrupted_runs_and_skips_completed_ones(begun, capfd) -> None:
    longer = "--trainer.max_epochs=2"
    assert main([*FIT, "--seed_everything=1"]) == 0  # represents a run that was interrupted after one epoch
    assert main([*FIT, "--seeds=2", "--resume", longer]) == 0
    last = RUNS / "version_0" / "checkpoints" / "last.ckpt"
    assert begun == [["--seed_everything=0"], ["--seed_everything=1", f"--ckpt_path={last}"]]
    assert [_checkpoint(version)["epoch"] for version in (0, 1)] == [2, 2]
    begun.clear()
    assert main([*FIT, "--seeds=3", "--resume", longer]) == 0  # the third one is new
    assert begun == [["--seed_everything=2"]]
    assert f"seed 1 (2 of 3): completed, {RUNS / 'version_0'}" in capfd.readouterr().out
    begun.clear()
    assert main([*FIT, "--seeds=1", "--resume", longer, "--model.init_args.distill_weight=0.8"]) == 0
    assert begun == [["--seed_everything=0"]]  # the finished run of this seed had another weight
    assert main([*FIT, "--seed_everything=0", longer]) == 0
    assert _same(_checkpoint(4), _checkpoint(1))


def test_failed_run_does_not_affect_the_others(begun, capfd, monkeypatch) -> None:
    train = seeds._fit
    monkeypatch.setattr(seeds, "_fit", lambda args: train(args) or 2 * ("--seed_everything=1" in args))
    assert main([*FIT, "--seeds=3"]) == 2
    said = capfd.readouterr().out
    assert "failed: exit code 2" in said
    scores = [_score(_checkpoint(version)) for version in (0, 2)]
    assert not _same(_checkpoint(0), _checkpoint(2))
    mean, std = statistics.mean(scores), statistics.stdev(scores)
    assert f"mean {mean:.4g}, standard deviation {std:.4g}, n = 2" in said
    with (RUNS / "seeds.csv").open() as file:
        rows = [(row["seed"], row["run"], row["value"]) for row in csv.DictReader(file)]
    assert rows == [("0", "version_0", str(scores[0])), ("1", "version_1", ""), ("2", "version_2", str(scores[1]))]
    assert len(begun) == 3


def test_error_before_training_ends_the_command(begun) -> None:
    assert main([*FIT, "--seeds=3", "--model.init_args.teacher_ckpt=lkd:nothing"]) == 2
    assert len(begun) == 1


def test_interruption_ends_the_command(capfd, monkeypatch) -> None:
    monkeypatch.setattr(seeds, "_fit", lambda args: 143)
    assert main([*FIT, "--seeds", "2"]) == 143
    assert "--seeds 2 --resume" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--seeds=0"], "at least 1 (--seeds 5: seeds 0 to 4), or distinct seeds separated by commas"),
        (["--seeds=x"], "got 'x'"),
        (["--seeds"], "got ''"),
        (["--seeds=1,1"], "got '1,1'"),
        (["--seeds=-1,2"], "got '-1,2'"),
        (["--seeds=2", "--seed_everything=3"], "remove --seed_everything"),
        (["--seeds=2", "--ckpt_path=last"], "use --resume instead"),
        (["--seeds=2", "--trainer.fast_dev_run=true"], "reports the best checkpoint of each run"),
        (["--seeds=2", "--trainer.max_epoch=2"], "max_epoch"),
    ],
)
def test_invalid_arguments(begun, capfd, args: list[str], says: str) -> None:
    assert main([*FIT, *args]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lkd: error: ")]
    assert says in line
    assert not begun


@pytest.mark.parametrize(("text", "wanted"), [("3", [0, 1, 2]), ("4,2", [4, 2]), ("[4, 2]", [4, 2]), ("3,", [3])])
def test_forms_of_seeds(text: str, wanted: list[int]) -> None:
    assert seeds._seeds(text) == wanted


def test_report_has_the_sample_standard_deviation(capsys) -> None:
    results = [seeds.Result(seed, Path(f"version_{seed}"), "val/acc", value) for seed, value in enumerate((0.1, 0.4))]
    seeds._report(Path(), results)
    assert "mean 0.25, standard deviation 0.2121, n = 2" in capsys.readouterr().out
