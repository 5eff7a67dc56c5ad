"""Output files of a study: the best config, a table and a page."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from lkd.io.tensor_cache import replacing
from lkd.io.yaml import load_yaml
from lkd.sweep.format import format_state
from lkd.sweep.page import page
from lkd.sweep.study import REASON, Study

BEST, TABLE, PAGE = "best.yaml", "trials.csv", "study.html"


def write(study: Study, with_page: bool = True) -> None:
    """Write the table, the best config and the page, each atomically.

    Args:
        study: The study.
        with_page: Whether to update the page.
    """
    with study.alone():  # so that an older state does not overwrite a newer one
        trials = study.trials
        with replacing(study.folder / TABLE) as file, file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows(_table(trials, list(study.space)))
        if (best := study.best) and (config := best_config(study, best)):
            with replacing(study.folder / BEST) as file:
                file.write_text(config, encoding="utf-8")
        if with_page:
            with replacing(study.folder / PAGE) as file:
                file.write_text(page(study, trials), encoding="utf-8")


def _table(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> Iterator[list[Any]]:
    yield ["trial", "state", "value", *keys, "reason"]
    for trial in trials:
        settings = [trial.params.get(key, "") for key in keys]
        value = "" if trial.state != TrialState.COMPLETE else trial.value
        yield [trial.number, format_state(trial), value, *settings, trial.user_attrs.get(REASON, "")]


def best_config(study: Study, best: FrozenTrial) -> str:
    """Return the config of a trial for `lkd fit`; empty if the folder of the trial is on another machine.

    Args:
        study: The study.
        best: The trial.
    """
    try:
        text = (study.trial_folder(best.number) / "version_0" / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    config = {key: value for key, value in load_yaml(text).items() if key not in ("config", "ckpt_path")}
    value = f"{study.plan.monitor} {best.value:.6g}"
    head = f"# Trial {best.number} of {study.name}: {value}. Train it with: lkd fit --config {study.folder / BEST}\n"
    return head + str(yaml.safe_dump(config, sort_keys=False, width=120, allow_unicode=True))


def checkpoint(study: Study, best: FrozenTrial) -> Path:
    """Return the best checkpoint of a trial, or its folder if there is none."""
    found = sorted((study.trial_folder(best.number) / "version_0" / "checkpoints").glob("best*.ckpt"))
    return found[0] if found else study.trial_folder(best.number)
