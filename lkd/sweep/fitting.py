"""Training of a trial: a run of `lkd fit` in this process."""

from __future__ import annotations

import gc
import shutil
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from contextvars import copy_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import optuna
from lightning.pytorch.callbacks import ProgressBar
from optuna.trial import TrialState

from lkd.callbacks import BestCheckpoint
from lkd.checkpoints.find import newest_checkpoint
from lkd.cli.arguments import prepare
from lkd.cli.errors import explain
from lkd.cli.lightning_cli import LkdCLI

LOG = "log.txt"
"""File with the output of `lkd fit`, in the folder of a trial."""


class Outcome(NamedTuple):
    """Result of a trial.

    Attributes:
        state: COMPLETE, PRUNED or FAIL.
        value: Best value of the monitored metric; None unless the trial is complete.
        reason: Why the trial ended early.
    """

    state: TrialState
    value: float | None = None
    reason: str = ""


class Plan(NamedTuple):
    """Settings that all trials have in common.

    Attributes:
        config: Resolved settings.
        name: Name of the run, which is also its folder below `root`.
        root: Folder of all runs.
        monitor: Metric whose best value is the value of a trial.
        mode: `min` or `max`: whether the smallest or the largest value is best.
        max_epochs: Number of epochs of a trial; None if the training is not limited in epochs.
    """

    config: dict[str, Any]
    name: str
    root: Path
    monitor: str
    mode: str
    max_epochs: int | None


class _Fit(LkdCLI):
    """`lkd fit` on one device, without a progress bar and with the callbacks of a trial; can stop before training."""

    def __init__(
        self,
        args: Sequence[str],
        name: str,
        until: Literal["parsed", "ready", "run"] = "run",
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        self._callbacks = callbacks
        super().__init__(args, name, until=until)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Create the trainer of a trial."""
        config = self._get(self.config_init, "trainer")
        if config.get("devices") in (None, "auto"):  # other devices may be used by other processes of the study
            config["devices"] = 1
        trainer = super().instantiate_trainer(**kwargs)
        own: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        own[:] = [*self._callbacks, *(callback for callback in own if not isinstance(callback, ProgressBar))]
        return trainer


class Settings:
    """Settings of a run, and a check of changes to them.

    Args:
        args: Arguments after `lkd fit`.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._context = copy_context()
        self._args, name, _ = prepare(["fit", *args])
        self._fit = self._context.run(_Fit, self._args, name, "parsed")

    def resolved(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return self._fit.resolved()

    def change(self, args: Sequence[str]) -> None:
        """Parse the settings again with changes.

        Args:
            args: Arguments that override the original ones.

        Raises:
            ValueError: If the changed settings are invalid. The parser may raise other exceptions.
        """
        self._context.run(self._fit.parse_arguments, self._fit.parser, [*self._args, *args])


def planned(config: dict[str, Any], args: Sequence[str]) -> Plan:
    """Instantiate the classes of a trial, and check that a sweep supports the settings.

    Args:
        config: Resolved settings of all trials.
        args: Arguments from which they were parsed.

    Raises:
        ValueError: If a sweep does not support the settings.
    """
    prepared = prepare(["fit", *args])
    fit = copy_context().run(_Fit, prepared.args, prepared.name, "ready")
    trainer = fit.trainer
    if trainer.world_size > 1:
        raise ValueError(
            "lkd sweep trains each trial in one process; remove --trainer.devices and --trainer.num_nodes, and start "
            "the same command once per device, as in CUDA_VISIBLE_DEVICES=1 lkd sweep ..., to share the work"
        )
    if config["trainer"]["logger"] not in (None, True, False):
        raise ValueError("lkd sweep logs each trial in its own folder; remove trainer.logger or set it to false")
    if trainer.fast_dev_run or not (best := _best(trainer)):  # type: ignore[attr-defined]
        raise ValueError(
            "the value of a trial is that of its best checkpoint, but with these settings none would be saved; use the "
            "defaults of trainer.enable_checkpointing, trainer.fast_dev_run, checkpoint.monitor and "
            "checkpoint.save_top_k"
        )
    if config["checkpoint"]["dirpath"] is not None:
        raise ValueError("lkd sweep saves the checkpoints of each trial in its own folder; remove checkpoint.dirpath")
    best.settle(fit.model)
    root = Path(config["trainer"]["default_root_dir"] or "runs")
    epochs = trainer.max_epochs
    return Plan(config, fit.run_name, root, str(best.monitor), best.mode, epochs if epochs and epochs > 0 else None)


def _best(trainer: L.Trainer) -> BestCheckpoint | None:
    kept = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
    return next((callback for callback in kept if callback.monitor and callback.save_top_k), None)


class _SameMetric(L.Callback):
    """Reject a trial whose best checkpoint is selected by a metric other than that of the study.

    Args:
        monitor: Metric of the study.
    """

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the monitored metrics."""
        monitors = [kept.monitor for kept in trainer.checkpoint_callbacks if isinstance(kept, BestCheckpoint)]
        if self._monitor not in monitors:
            other = next(filter(None, monitors), "NAME, with a metric that you log")
            raise ValueError(
                f"{self._monitor} is not logged because the loss does not train the logits; use --monitor {other}"
            )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint from which to resume a trial; None if it has to start from the beginning.

    Args:
        folder: Folder of the trial.
    """
    try:
        return newest_checkpoint(folder, "last")
    except (FileNotFoundError, ValueError):  # missing or corrupt
        return None


def train(args: Sequence[str], name: str, folder: Path, monitor: str, callbacks: Sequence[L.Callback] = ()) -> Outcome:
    """Train a trial, or resume an interrupted one.

    Args:
        args: Arguments after `lkd fit`.
        name: Name of its run.
        folder: Folder of its runs.
        monitor: Metric of the study.
        callbacks: Additional callbacks.

    Returns:
        Result of the trial. Exceptions in the training are returned as failures.

    Raises:
        SystemExit: After Ctrl-C or SIGTERM.
    """
    last = last_checkpoint(folder)
    resumed = [] if last is None else [f"--ckpt_path={last}"]
    for begun in folder.glob("version_*") if last is None else ():  # interrupted before the first checkpoint
        shutil.rmtree(begun)
    with (folder / LOG).open("a", buffering=1, encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            own = [*callbacks, _SameMetric(monitor)]
            fit = copy_context().run(_Fit, prepare(["fit", *args, *resumed]).args, name, "run", own)
            best = _best(fit.trainer)
            if best is None or best.best_model_score is None:
                return Outcome(TrialState.FAIL, reason="the monitored metric was not logged")
            return Outcome(TrialState.COMPLETE, float(best.best_model_score))
        except optuna.TrialPruned as error:
            return Outcome(TrialState.PRUNED, reason=str(error))
        except Exception as error:
            traceback.print_exc()
            return Outcome(TrialState.FAIL, reason=" ".join(explain(error).split()))
        finally:
            gc.collect()  # a trainer is part of reference cycles
