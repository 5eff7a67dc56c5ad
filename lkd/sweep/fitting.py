"""One trial: a run of `lkd fit` in this process."""

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
import yaml
from lightning.pytorch.callbacks import ProgressBar
from optuna.trial import TrialState

from lkd.callbacks import BestCheckpoint
from lkd.checkpoints.find import newest_checkpoint
from lkd.cli.arguments import prepare
from lkd.cli.errors import explain
from lkd.cli.lightning_cli import LkdCLI

LOG = "log.txt"
"""Beside a trial's runs: what `lkd fit` has printed."""


class Outcome(NamedTuple):
    """What a trial has come to.

    Args:
        state: COMPLETE, PRUNED or FAIL.
        value: The best that was measured; None unless it is complete.
        reason: Why it ended early.
    """

    state: TrialState
    value: float | None = None
    reason: str = ""


class Plan(NamedTuple):
    """What every trial has in common.

    Args:
        config: The resolved settings.
        name: The run's name: its folder below `root`.
        root: Where runs lie.
        monitor: The curve whose best point is a trial's value.
        mode: Whether `min` or `max` is best.
        max_epochs: How long a trial trains; None: that is not said in epochs.
    """

    config: dict[str, Any]
    name: str
    root: Path
    monitor: str
    mode: str
    max_epochs: int | None


class _Fit(LkdCLI):
    """`lkd fit` on one device, without a bar, with a trial's callbacks; or only as far as a sweep wants to know."""

    def __init__(
        self,
        args: Sequence[str],
        name: str,
        until: Literal["parsed", "built", "trained"] = "trained",
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        self._until, self._callbacks = until, callbacks
        super().__init__(args, name)

    def instantiate_classes(self) -> None:
        """Build, if wanted."""
        if self._until != "parsed":
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """The same."""
        if self._until != "parsed":
            super().after_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer of one trial."""
        config = self._get(self.config_init, "trainer")
        if config.get("devices") in (None, "auto"):  # on each device a sweep of its own may work at the study
            config["devices"] = 1
        trainer = super().instantiate_trainer(**kwargs)
        own: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        own[:] = [*self._callbacks, *(callback for callback in own if not isinstance(callback, ProgressBar))]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        if self._until == "trained":
            super()._run_subcommand(subcommand)

    def resolved(self) -> dict[str, Any]:
        """The settings as plain values."""
        settings: dict[str, Any] = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False))
        return settings


class Settings:
    """The settings of a run, and whether others would do.

    Args:
        args: The arguments behind `lkd fit`.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._context = copy_context()
        self._args, name, _ = prepare(["fit", *args])
        self._fit = self._context.run(_Fit, self._args, name, "parsed")

    def resolved(self) -> dict[str, Any]:
        """All of them, as plain values."""
        return self._fit.resolved()

    def change(self, args: Sequence[str]) -> None:
        """Take others.

        Args:
            args: They, as arguments over the first ones.

        Raises:
            ValueError: If they are none; or what else the parser raises.
        """
        self._context.run(self._fit.parse_arguments, self._fit.parser, [*self._args, *args])


def planned(config: dict[str, Any], args: Sequence[str]) -> Plan:
    """Build what a trial would train, and look whether a sweep can work with it.

    Args:
        config: The resolved settings that all trials have.
        args: The arguments that these come from.

    Raises:
        ValueError: If it cannot.
    """
    prepared = prepare(["fit", *args])
    fit = copy_context().run(_Fit, prepared.args, prepared.name, "built")
    trainer = fit.trainer
    if trainer.world_size > 1:
        raise ValueError(
            "lkd sweep trains each trial in one process; leave out --trainer.devices, --trainer.num_nodes, and begin "
            "the same command once for each device, as in CUDA_VISIBLE_DEVICES=1 lkd sweep ...: they share the work"
        )
    if config["trainer"]["logger"] not in (None, True, False):
        raise ValueError("lkd sweep keeps each trial in a folder of its own; leave trainer.logger to lkd (or false)")
    if trainer.fast_dev_run or not (best := _best(trainer)):  # type: ignore[attr-defined]
        raise ValueError(
            "a trial's value is its best checkpoint's, and there would be none; leave trainer.enable_checkpointing, "
            "trainer.fast_dev_run, checkpoint.monitor and checkpoint.save_top_k as they are"
        )
    if config["checkpoint"]["dirpath"] is not None:
        raise ValueError("lkd sweep keeps each trial's checkpoints in its own folder; leave checkpoint.dirpath out")
    best.settle(fit.model)
    root = Path(config["trainer"]["default_root_dir"] or "runs")
    epochs = trainer.max_epochs
    return Plan(config, fit.run_name, root, str(best.monitor), best.mode, epochs if epochs and epochs > 0 else None)


def _best(trainer: L.Trainer) -> BestCheckpoint | None:
    kept = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
    return next((callback for callback in kept if callback.monitor and callback.save_top_k), None)


class _SameCurve(L.Callback):
    """Refuse a trial whose best checkpoint is chosen by another curve than the study's."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the curves."""
        for kept in trainer.checkpoint_callbacks:
            if isinstance(kept, BestCheckpoint) and kept.monitor != kept.asked_monitor:
                other = kept.monitor or "NAME, with a curve of your own"
                raise ValueError(
                    f"{kept.asked_monitor} is not logged, as the loss does not train the logits; give --monitor {other}"
                )


def last_checkpoint(folder: Path) -> Path | None:
    """From where a trial goes on; None if it has to begin.

    Args:
        folder: The trial's.
    """
    try:
        return newest_checkpoint(folder, "last")
    except (FileNotFoundError, ValueError):  # there is none, or none that is whole
        return None


def train(args: Sequence[str], name: str, folder: Path, callbacks: Sequence[L.Callback] = ()) -> Outcome:
    """Train one trial, or the rest of one.

    Args:
        args: The arguments behind `lkd fit`.
        name: Its run's name.
        folder: Its runs' folder.
        callbacks: What watches it.

    Returns:
        What it has come to; also where it has failed.

    Raises:
        SystemExit: After Ctrl-C or SIGTERM.
    """
    last = last_checkpoint(folder)
    goes_on = [] if last is None else [f"--ckpt_path={last}"]
    for begun in folder.glob("version_*") if last is None else ():  # killed before there was anything to keep
        shutil.rmtree(begun)
    with (folder / LOG).open("a", buffering=1, encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            watching = [*callbacks, _SameCurve()]
            fit = copy_context().run(_Fit, prepare(["fit", *args, *goes_on]).args, name, "trained", watching)
            best = _best(fit.trainer)
            if best is None or best.best_model_score is None:
                return Outcome(TrialState.FAIL, reason="nothing was measured")
            return Outcome(TrialState.COMPLETE, float(best.best_model_score))
        except optuna.TrialPruned as error:
            return Outcome(TrialState.PRUNED, reason=str(error))
        except Exception as error:
            traceback.print_exc()
            return Outcome(TrialState.FAIL, reason=" ".join(explain(error).split()))
        finally:
            gc.collect()  # a trainer is held by its own parts
