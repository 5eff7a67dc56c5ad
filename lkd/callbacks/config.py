"""Save the resolved config of a run, and compare it when the run is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from lkd._compat import write_event
from lkd.callbacks.record import run_folder
from lkd.io.yaml import load_yaml

_FREE = (
    "ckpt_path",
    "config",
    "name",
    "last_checkpoint",
    "trainer.max_",
    "trainer.enable_",
    "trainer.log_every_n_steps",
)
"""Settings that do not change the remaining steps of a run."""

_IDENTITY = ("seed_everything", "data", "model")
"""Settings that identify a run."""

_PLACES = tuple(f"data.init_args.{name}" for name in ("root", "num_workers", "resident_limit"))
"""Settings of the data that do not change its batches."""

_STATEFUL = (
    *(".optimizer", ".optimizer.class_path", ".lr_scheduler", ".lr_scheduler.class_path"),
    ".lr_scheduler_interval",
)
"""Settings on which the saved state depends: it cannot be loaded if they differ."""


class SaveConfig(SaveConfigCallback):
    """Save the resolved config in the folder of the run, and as text in TensorBoard, after the first successful step.

    Args:
        parser: Parser of the command line.
        config: The config. Its `ckpt_path` is not saved, because it belongs to this start, not to the run.
        settings: Other arguments of Lightning's `SaveConfigCallback`.
    """

    def __init__(self, parser: Any, config: Any, **settings: Any) -> None:
        super().__init__(parser, config.clone(), **settings)
        self.config["ckpt_path"] = None
        self._step: int | None = None  # from which the run resumes
        self._is_saved = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing: a later check may reject the run and must leave its folder unchanged."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the step from which the run resumes."""
        self._step = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """If the run is resumed, compare its saved config with this one, and mark the restart in TensorBoard.

        The mark makes TensorBoard discard the values logged after the step from which the run resumes.

        Raises:
            ValueError: If the state of the optimizer or schedule does not fit this config.
        """
        path = Path(run_folder(trainer)) / self.config_filename  # called in all processes, as it is broadcast
        if self._step is None:
            return
        self._compare(path)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                start = Event(step=self._step, session_log=SessionLog(status=SessionLog.START))
                write_event(logger, start, self._step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save the config next to the checkpoints, since not every logger has a folder for each run."""
        if self._is_saved:
            return
        self._is_saved = True
        folder = run_folder(trainer)  # called in all processes, as it is broadcast
        if not trainer.is_global_zero:
            return
        files, text = get_filesystem(folder), self.parser.dump(self.config, skip_none=False, skip_validation=True)
        files.makedirs(folder, exist_ok=True)
        with files.open(f"{folder}/{self.config_filename}", "w", encoding="utf-8") as file:
            file.write(text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def _compare(self, path: Path) -> None:
        changes = [change for change in _changed(path, self.parser, self.config) if not change[0].startswith(_FREE)]
        differences = [f"{name} {_short(old)} (now {_short(new)})" for name, old, new in changes]
        pairs = zip(changes, differences, strict=True)
        if unloadable := [text for (name, *_), text in pairs if name.endswith(_STATEFUL)]:
            raise ValueError(
                f"the run in {path.parent} was started with {unloadable[0]}, and its saved state does not fit the new "
                "setting; restore the original setting, or start a new run without --resume and --ckpt_path"
            )
        if differences:
            more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
            held = "; optimizer and schedule keep their original values" if _is_held(changes) else ""
            rank_zero_warn(f"this run was started with different settings: {', '.join(differences[:4])}{more}{held}")


def check_same_run(checkpoint: Path, parser: Any, config: Any) -> None:
    """Check that a checkpoint belongs to a run with the same seed, data and model.

    Other settings may differ: the number of epochs or steps, loggers, callbacks, devices, limits of batches, and the
    folder, workers and memory limit of the data.

    Args:
        checkpoint: Checkpoint in the folder of its run.
        parser: Parser of the command line.
        config: Current settings.

    Raises:
        ValueError: If seed, data or model differ.
    """
    folder = checkpoint.absolute().parent.parent
    changes = [
        f"{name} {_short(old)} (now {_short(new)})"
        for name, old, new in _changed(folder / "config.yaml", parser, config)
        if name.startswith(_IDENTITY) and not name.startswith(_PLACES)
    ]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"--resume found {checkpoint}, whose run has different settings: {', '.join(changes[:3])}{more}; omit "
            f"--resume, set a different --name, or continue that run anyway with --ckpt_path {checkpoint}"
        )


def _changed(path: Path, parser: Any, config: Any) -> list[tuple[str, Any, Any]]:
    """Return name, old value and new value of each setting that differs from a saved config; empty if there is none."""
    try:
        original = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return list(_changes(original, yaml.safe_load(parser.dump(config, skip_none=False))))


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old value and new value of each setting that is in both configs and differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if key in old:
                yield from _changes(old[key], new[key], f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _is_held(changes: list[tuple[str, Any, Any]]) -> bool:
    return any(".optimizer." in name or ".lr_scheduler." in name for name, *_ in changes)


def _short(value: Any) -> str:
    text = str(value.get("class_path", value) if isinstance(value, dict) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
