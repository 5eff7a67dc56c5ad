"""Checkpoints of a run: the best ones, and the last one, from which the run resumes."""

from __future__ import annotations

import os
import pickle
import re
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd._compat import validates_in_epoch
from lkd.callbacks.stop import StopSignal
from lkd.checkpoints.io import AtomicCheckpointIO
from lkd.io.safe_load import read_torch

_AGREE = 10
"""Interval in steps at which several processes agree on whether to save or stop; each time costs a round trip."""


class BestCheckpoint(ModelCheckpoint):
    """Save the best checkpoint according to a validation metric.

    This is Lightning's `ModelCheckpoint` with other defaults.

    Args:
        monitor: Name of the monitored metric. `None` keeps the most recent checkpoint. If the loss does not train the
            logits, as with features alone, `val/acc` is replaced by the distillation loss (`val/<criterion>`), or by
            `None` if that is not evaluated. Without validation images, a metric `val/...` is replaced by `None`.
        mode: Whether the `min` or the `max` of the metric is best. `auto` selects `min` for losses, for the terms of a
            criterion and for metrics of the task whose `higher_is_better` is False, and `max` for all other metrics.
        save_top_k: Number of best checkpoints to keep; -1 keeps all.
        filename: File name without `.ckpt`. If `None`, it is `best`, or `best-{epoch}` if `save_top_k` is not 1.
        enable_version_counter: Whether to keep an existing file of the same name and append a number to the new one. By
            default the file is replaced, because a resumed run finds the files that it saved before the interruption.
        settings: Other arguments of `ModelCheckpoint`.

    Attributes:
        asked_monitor: The argument `monitor`.
    """

    def __init__(
        self,
        monitor: str | None = "val/acc",
        mode: Literal["auto", "min", "max"] = "auto",
        save_top_k: int = 1,
        filename: str | None = None,
        enable_version_counter: bool = False,
        **settings: Any,
    ) -> None:
        self.asked_monitor, self._asked_mode = monitor, mode
        if mode == "auto":
            mode = "min" if monitor is not None and "loss" in monitor else "max"
        if filename is None:
            filename = "best" if save_top_k == 1 else "best-{epoch}"
        super().__init__(
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            filename=filename,
            enable_version_counter=enable_version_counter,
            **settings,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the monitored metric.

        This precedes loading the state of a resumed run, which is stored under a key that contains the metric.
        """
        self.settle(pl_module)
        if stage == "fit" and (self.monitor or "").startswith("val/") and not _validates(trainer):
            self.monitor = None
        super().setup(trainer, pl_module, stage)

    def settle(self, module: Any) -> None:
        """Choose the monitored metric and whether its minimum or maximum is best.

        Args:
            module: The module to be trained.
        """
        self.monitor, mode = self.asked_monitor, self._asked_mode
        main = getattr(module, "main_metric", "acc")
        if self.monitor == "val/acc" and main != "acc":
            self.monitor = None if main is None else f"val/{main}"
        if mode == "auto":
            is_loss = getattr(module, "is_loss", lambda curve: "loss" in curve)
            mode = "min" if self.monitor is not None and is_loss(self.monitor) else "max"
        self.mode, self.kth_value = mode, torch.tensor(torch.inf if mode == "min" else -torch.inf)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report which metric is monitored instead of the accuracy."""
        super().on_fit_start(trainer, pl_module)
        if self.monitor is None and self.asked_monitor is not None and not _validates(trainer):
            pl_module.print("Without validation, the most recent checkpoint is saved as the best one.")
        elif self.monitor != self.asked_monitor and not getattr(pl_module, "trains_logits", True):
            best = f"the one with the lowest {self.monitor}" if self.monitor else "the most recent one"
            pl_module.print(f"The loss does not train the logits, so the best checkpoint is {best}.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, including the current score and the paths of the checkpoints.

        Lightning does not restore the current score, nor the paths if the folder of the run was renamed or moved.
        """
        super().load_state_dict(self._moved(state_dict))
        self.current_score = state_dict.get("current_score")

    def _moved(self, state: dict[str, Any]) -> dict[str, Any]:
        folder, paths = str(self.dirpath), ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {path: str(Path(folder) / Path(path).name) for path in [*map(state.get, paths), *state["best_k_models"]]}
        if not state["best_model_path"] or not Path(here[state["best_model_path"]]).is_file():
            return state
        kept = {here[path]: score for path, score in state["best_k_models"].items()}
        named = {name: here[state[name]] if state.get(name) else "" for name in paths}
        return {**state, **named, "dirpath": self.dirpath, "best_k_models": kept}


def _validates(trainer: L.Trainer) -> bool:
    """Return whether the run has validation images, as far as this is known before the first epoch."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return trainer.limit_val_batches != 0 and "val" in getattr(data, "datasets", ("val",))


class LastCheckpoint(ModelCheckpoint):
    """Save `last.ckpt`, from which an interrupted run resumes exactly.

    The checkpoint is saved between two steps: before each epoch, at the end of `fit`, periodically within long epochs,
    and after SIGTERM, SLURM's signal before a time limit, or Ctrl-C, which then stop the run. The preceding checkpoint
    is kept as `previous.ckpt`. Loggers are flushed first, so no logged value is lost. If a run is resumed within an
    epoch, `on_train_batch_start` is called twice for the batch before which the checkpoint was saved; a custom callback
    that counts batches there counts that batch twice.

    Args:
        minutes: Interval between checkpoints within an epoch, in minutes. `None` disables the timer.
        every_n_train_steps: Interval between checkpoints within an epoch, in optimizer steps. `None` disables it.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(self, minutes: float | None = 10.0, every_n_train_steps: int | None = None) -> None:
        for name, number in (("minutes", minutes), ("every_n_train_steps", every_n_train_steps)):
            if number is not None and not number > 0:
                raise ValueError(f"last_checkpoint.{name} must be positive, or null to disable it, got {number}")
        super().__init__(filename="last", enable_version_counter=False)
        self.minutes, self.every_n_train_steps = minutes, every_n_train_steps
        self._signal = StopSignal()
        self._place: Literal["between epochs", "between steps"] | None = None
        self._step = self._boundaries = 0
        self._clock = 0.0
        self._is_own = self._is_checked = False
        self._metrics: dict[str, Tensor] = {}
        self._batches: list[Any] = []  # batch size and number of processes
        self._lock: int | None = None

    @property
    def path(self) -> Path:
        """Path of the checkpoint on the local file system. The folder is known after `setup`."""
        return Path(str(self.dirpath)) / "last.ckpt"

    @property
    def _is_local(self) -> bool:
        return "://" not in str(self.dirpath)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the folder, lock it, and make the trainer write checkpoints atomically."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if not self._is_local:
            return
        # A last.ckpt from which this run was not resumed may be corrupt, so it must not become previous.ckpt.
        self._is_own = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == self.path.resolve()
        if trainer.is_global_zero:
            self._lock = locked(self.path.parent)
            for left in self.path.parent.glob(".*.ckpt.*"):  # left by a process that was killed while writing
                left.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the timer, and defer signals to the end of a step."""
        self._step, self._clock, self._boundaries = trainer.global_step, time.monotonic(), 0
        self._signal.watch(trainer)
        trainer.callback_metrics.update(self._metrics)
        batches = [getattr(trainer.datamodule, "batch_size", None), trainer.world_size]  # type: ignore[attr-defined]
        if self._batches not in ([], batches) and _loop(trainer).batch_progress.current.started:
            rank_zero_warn(
                "the run was interrupted within an epoch with batch size {} and {} process(es), and resumes with batch "
                "size {} and {}: some images of this epoch are repeated or skipped".format(*self._batches, *batches)
            )
        self._batches = batches

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the batch size; `on_save_checkpoint` adds the metrics."""
        return {**super().state_dict(), "metrics": {}, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, the metrics and the batch size of the interrupted run."""
        super().load_state_dict(state_dict)
        self._metrics, self._batches = dict(state_dict["metrics"]), list(state_dict["batches"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state before the epoch, and stop if a signal was received."""
        _forget_restart(trainer)
        self._save(trainer, "between epochs")
        if self._any(trainer, self._signal.received is not None):
            self._signal.obey(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch if a checkpoint is due, and stop if a signal was received."""
        _forget_restart(trainer)
        if not _is_boundary(trainer, batch_idx):
            return
        steps, minutes = self.every_n_train_steps, self.minutes
        due = steps is not None and trainer.global_step - self._step >= steps
        late = minutes is not None and time.monotonic() - self._clock >= 60 * minutes
        self._boundaries += 1
        asked = False
        if trainer.world_size == 1 or self._boundaries % _AGREE == 0:
            asked = self._any(trainer, self._signal.received is not None)
            due = self._any(trainer, late) or asked or due
        if due:
            self._save(trainer, "between steps")
        if asked:
            self._signal.obey(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state, from which a longer run can continue.

        If the run ended within an epoch because of its maximum number of steps or its time limit, it can continue
        there.
        """
        batches = _loop(trainer).batch_progress
        whole = batches.is_last_batch or batches.current.started >= trainer.num_training_batches
        stopped_early = not whole and _is_boundary(trainer, batches.current.started)
        self._save(trainer, "between steps" if stopped_early else "between epochs")
        self._signal.release()  # Lightning restores the handlers before teardown, which must not set them again

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the signal handlers and unlock the folder."""
        self._signal.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers and unlock the folder if the run fails."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_end(self, *args: Any) -> None:
        """Do nothing: the step is not complete until the module has logged it."""

    def on_train_epoch_end(self, *args: Any) -> None:
        """Do nothing: metrics of the epoch are still to be logged, and a schedule may depend on them."""

    def on_validation_end(self, *args: Any) -> None:
        """Do nothing, for the same reason as in `on_train_epoch_end`."""

    @staticmethod
    def _any(trainer: L.Trainer, decision: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _save(self, trainer: L.Trainer, place: Literal["between epochs", "between steps"]) -> None:
        self._clock = time.monotonic()
        if trainer.global_step == self._step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._step = trainer.global_step
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero and self._is_own:
            _keep_previous(self.path)
        self._is_own, self._place = self._is_local, place
        self.best_model_path = str(self.path) if self._is_local else f"{self.dirpath}/last.ckpt"
        try:
            trainer.save_checkpoint(self.best_model_path, weights_only=False)
        finally:
            self._place = None
        if self._is_local and trainer.is_global_zero and not self._is_checked:
            self._is_checked = True
            _warn_of_code(self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the logged metrics and, in `last.ckpt`, the exact position of the run.

        Schedules and other callbacks may depend on the metrics. Batches and epochs that Lightning counts as ready
        but not as started are counted again by the resumed run.
        """
        metrics = {name: metric.detach().cpu() for name, metric in trainer.callback_metrics.items()}
        checkpoint["callbacks"][self.state_key]["metrics"] = metrics
        if self._place is None:  # another callback's checkpoint
            return
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            for progress in (epochs, batches):
                progress[part]["ready"] = progress[part]["started"]
            if self._place == "between steps":
                epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["started"] - 1
        batches["is_last_batch"] = False
        if self._place == "between epochs":
            batches["current"] = dict.fromkeys(batches["current"], 0)
        elif _was_validated(trainer):  # Lightning counts this step again when it resumes
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _loop(trainer: L.Trainer) -> Any:
    return trainer.fit_loop.epoch_loop


def _forget_restart(trainer: L.Trainer) -> None:
    """Reset Lightning's restart flag once its loops have found their position.

    If it stayed set, Lightning would later skip a step of the learning-rate schedule.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting:
        loop.restarting = False


def _is_boundary(trainer: L.Trainer, seen: int) -> bool:
    """Return whether a run can resume after this many batches of an epoch: not while gradients are accumulated."""
    return bool(seen > 0 and seen % trainer.accumulate_grad_batches == 0)


def _was_validated(trainer: L.Trainer) -> bool:
    """Return whether the last batch was followed by a validation within the epoch."""
    engine: Any = trainer
    every, batches = engine.val_check_batch, _loop(trainer).batch_progress
    if every in (None, float("inf")) or not validates_in_epoch(_loop(trainer)):
        return False
    counted = batches.total if engine.check_val_every_n_epoch is None else batches.current
    return bool(counted.started % every == 0)


def _warn_of_code(path: Path) -> None:
    """Warn if a checkpoint contains objects that cannot be loaded without executing code, as in a callback's state."""
    try:
        if path.is_file():  # not a folder, as for a sharded student
            read_torch(path)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        rank_zero_warn(
            f"{path} contains {named[1] if named else 'an object'} from the state of a custom callback or module; "
            "loading it executes code, so this run can only be resumed with --weights_only false; save plain numbers "
            "instead"
        )


def locked(folder: Path) -> int | None:
    """Lock a folder for this process until the returned file is closed or the process ends.

    Args:
        folder: The folder, which is created if it does not exist.

    Returns:
        File descriptor, which can be copied together with a callback, unlike a file object. `None` if the system does
        not support locks.

    Raises:
        ValueError: If another process has locked the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the workers of a data loader
    except (BlockingIOError, PermissionError) as error:
        os.close(file)
        raise ValueError(
            f"another process is training the run in {folder.parent}; wait until it ends, or start a new run without "
            "--resume and --ckpt_path"
        ) from error
    except OSError:  # a file system that does not support locks
        os.close(file)
        return None
    return file


def _keep_previous(path: Path) -> None:
    """Hard-link a file as `previous.ckpt`, so that it is kept when it is replaced."""
    previous = path.with_name("previous.ckpt")
    if path.is_file():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system that does not support hard links
            path.replace(previous)
