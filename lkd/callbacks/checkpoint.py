"""Which states of a run are kept: the best, and the last, from which it goes on."""

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

from lkd.callbacks.stop import StopSignal
from lkd.checkpoints.io import AtomicCheckpointIO
from lkd.io.safe_load import read_torch

_AGREE = 10
"""Steps between two moments at which several processes ask each other whether to save or stop: a round trip each."""


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, for the best by validation.

    Args:
        monitor: Name of a curve; None: the newest is kept. Where the loss does not train the logits, as with features
            alone, `val/acc` stands for the distillation loss (`val/<criterion>`), or, if that is not measured, None.
        mode: Whether `min` or `max` is best; `auto`: the least of a loss and of a criterion's terms, the most of
            anything else.
        save_top_k: How many of the best are kept; -1: all.
        filename: Without `.ckpt`; None: `best`, or `best-{epoch}` if more than one is kept.
        enable_version_counter: Whether a file of that name stays, and the new one gets a number; by default it is
            replaced, as a resumed run meets the files of its first life.
        settings: ModelCheckpoint's other settings.

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
        """Settle what is monitored before a resumed run looks for its state, which goes by that name."""
        self.settle(pl_module)
        super().setup(trainer, pl_module, stage)

    def settle(self, module: Any) -> None:
        """Settle which curve is monitored, and whether its least or its most is best.

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
        """Tell which curve takes the place of the accuracy."""
        super().on_fit_start(trainer, pl_module)
        if self.monitor != self.asked_monitor:
            best = f"the one with the lowest {self.monitor}" if self.monitor else "the newest"
            pl_module.print(f"The loss does not train the logits, so the best checkpoint is {best}.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also what Lightning forgets: the current score, and all if the run's folder has another name by now."""
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


class LastCheckpoint(ModelCheckpoint):
    """Keep `last.ckpt`, from which a run goes on as if it had never stopped.

    It is written between two steps: before each epoch, at the end of fit, in long epochs every few minutes or steps,
    and after SIGTERM, SLURM's signal or Ctrl-C, which stop the run then. The one before it stays as `previous.ckpt`.
    What loggers have got is written first, so that no point of a curve is lost. A callback of your own that counts in
    `on_train_batch_start` counts the batch before which it is written twice, if the run is resumed there.

    Args:
        minutes: Time between two savings in an epoch; None: it is not looked at.
        every_n_train_steps: Steps of the optimizer between two savings in an epoch; None: they are not counted.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(self, minutes: float | None = 10.0, every_n_train_steps: int | None = None) -> None:
        for name, number in (("minutes", minutes), ("every_n_train_steps", every_n_train_steps)):
            if number is not None and not number > 0:
                raise ValueError(f"last_checkpoint.{name} must be positive, or null for never, got {number}")
        super().__init__(filename="last", enable_version_counter=False)
        self.minutes, self.every_n_train_steps = minutes, every_n_train_steps
        self._signal = StopSignal()
        self._place: Literal["between epochs", "between steps"] | None = None
        self._step = self._boundaries = 0
        self._clock = 0.0
        self._is_own = self._is_looked_at = False
        self._metrics: dict[str, Tensor] = {}
        self._batches: list[Any] = []  # their size, and the number of processes
        self._lock: int | None = None

    @property
    def path(self) -> Path:
        """The file; its folder is known after `setup`, and on this machine."""
        return Path(str(self.dirpath)) / "last.ckpt"

    @property
    def _is_local(self) -> bool:
        return "://" not in str(self.dirpath)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, and see that files are written at one stroke."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if not self._is_local:
            return
        # A last.ckpt that this run does not come from may be damaged: it must not become the previous one.
        self._is_own = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == self.path.resolve()
        if trainer.is_global_zero:
            self._lock = locked(self.path.parent)
            for left in self.path.parent.glob(".*.ckpt.*"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, signals wait for the end of a step."""
        self._step, self._clock, self._boundaries = trainer.global_step, time.monotonic(), 0
        self._signal.watch(trainer)
        trainer.callback_metrics.update(self._metrics)
        batches = [getattr(trainer.datamodule, "batch_size", None), trainer.world_size]  # type: ignore[attr-defined]
        if self._batches not in ([], batches) and _loop(trainer).batch_progress.current.started:
            rank_zero_warn(
                "the run stopped within an epoch, with batches of {} in {} processes, and goes on with batches of {} "
                "in {}: of this epoch it sees some images twice, or not at all".format(*self._batches, *batches)
            )
        self._batches = batches

    def state_dict(self) -> dict[str, Any]:
        """Also how large batches are; `on_save_checkpoint` adds what was measured."""
        return {**super().state_dict(), "metrics": {}, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same."""
        super().load_state_dict(state_dict)
        self._metrics, self._batches = dict(state_dict["metrics"]), list(state_dict["batches"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the epochs so far have come to."""
        _forget_restart(trainer)
        self._save(trainer, "between epochs")
        if self._any(trainer, self._signal.received is not None):
            self._signal.obey(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save in an epoch, if it is time; stop, if so asked."""
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
        """Save the end, from which a longer run can go on: in mid-epoch, if its steps or its time were over there."""
        batches = _loop(trainer).batch_progress
        whole = batches.is_last_batch or batches.current.started >= trainer.num_training_batches
        stopped_early = not whole and _is_boundary(trainer, batches.current.started)
        self._save(trainer, "between steps" if stopped_early else "between epochs")
        self._signal.release()  # Lightning gives its own handlers back before teardown, which must not bring them again

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give signals and the folder back."""
        self._signal.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same, if the run fails."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_end(self, *args: Any) -> None:
        """Not here: a step is not over before the module has logged it."""

    def on_train_epoch_end(self, *args: Any) -> None:
        """Not here: the epoch's curves are still to come, and a schedule may wait for them."""

    def on_validation_end(self, *args: Any) -> None:
        """Not here, for the same reason."""

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
        if self._is_local and trainer.is_global_zero and not self._is_looked_at:
            self._is_looked_at = True
            _warn_of_code(self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what was measured, as a schedule may wait for it or a callback watch it; and where the run is.

        What has been got ready, but has not begun, is to be done by who goes on.
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
        elif _was_validated(trainer):  # there, Lightning counts a step when it goes on
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _loop(trainer: L.Trainer) -> Any:
    return trainer.fit_loop.epoch_loop


def _forget_restart(trainer: L.Trainer) -> None:
    """Where this is asked, Lightning has found its place; later on it would leave out a schedule's step."""
    loop: Any = trainer.fit_loop
    if loop.restarting:
        loop.restarting = False


def _is_boundary(trainer: L.Trainer, seen: int) -> bool:
    """Whether a run can go on after so many batches of an epoch: not while gradients are summed for a step to come."""
    return bool(seen > 0 and seen % trainer.accumulate_grad_batches == 0)


def _was_validated(trainer: L.Trainer) -> bool:
    """Whether the last batch was followed by a validation within the epoch."""
    engine: Any = trainer
    every, batches = engine.val_check_batch, _loop(trainer).batch_progress
    if every in (None, float("inf")) or not _loop(trainer)._should_check_val_epoch():
        return False
    counted = batches.total if engine.check_val_every_n_epoch is None else batches.current
    return bool(counted.started % every == 0)


def _warn_of_code(path: Path) -> None:
    """Say in time that a checkpoint holds what is not read without running code, as a callback's state may."""
    try:
        if path.is_file():  # and no folder, as of a sharded student
            read_torch(path)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        rank_zero_warn(
            f"{path} holds {named[1] if named else 'an object'}, in the state of a callback or module of your own: to "
            "read it would run code, so this run can only go on with --weights_only false; keep plain numbers instead"
        )


def locked(folder: Path) -> int | None:
    """Keep a folder for this process, until what is returned is closed or the process is gone.

    Returns:
        An open file's number, which unlike a file can be copied with the callback that has it; None if the system has
        no locks.

    Raises:
        ValueError: If another process has the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: a loader's workers do not inherit it
    except (BlockingIOError, PermissionError) as error:
        os.close(file)
        raise ValueError(
            f"another process is training the run in {folder.parent}; wait for its end, or begin a new one without "
            "--resume and --ckpt_path"
        ) from error
    except OSError:  # a file system without locks
        os.close(file)
        return None
    return file


def _keep_previous(path: Path) -> None:
    """Give a file a second name, under which it stays when it is replaced."""
    previous = path.with_name("previous.ckpt")
    if path.is_file():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system without links
            path.replace(previous)
