"""A run's own config: kept in its folder, and looked at again where the run goes on."""

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
"""Settings that change nothing in the steps that a run has still to make."""

_IDENTITY = ("seed_everything", "data", "model")
"""Settings that make a run what it is."""

_PLACES = tuple(f"data.init_args.{name}" for name in ("root", "num_workers", "resident_limit"))
"""Settings of the data that do not change its batches."""

_STATEFUL = (
    *(".optimizer", ".optimizer.class_path", ".lr_scheduler", ".lr_scheduler.class_path"),
    ".lr_scheduler_interval",
)
"""What a checkpoint's state is of: another class could not go on from it."""


class SaveConfig(SaveConfigCallback):
    """Save the resolved config in the run's folder, and as text in TensorBoard, when the first step has succeeded.

    Args:
        parser: The command line's.
        config: The config; the checkpoint in it is left out, as it belongs to this start and not to the run.
        settings: As for Lightning's.
    """

    def __init__(self, parser: Any, config: Any, **settings: Any) -> None:
        super().__init__(parser, config.clone(), **settings)
        self.config["ckpt_path"] = None
        self._step: int | None = None  # from which a run goes on
        self._is_saved = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Not yet: what refuses the run comes later, and must leave the folder as it is."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note from which step on."""
        self._step = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where a run goes on, compare its config with this one; tell TensorBoard which points will come again.

        Raises:
            ValueError: If the state of its optimizer or schedule is none for this config.
        """
        path = Path(run_folder(trainer)) / self.config_filename  # in all processes: it is broadcast
        if self._step is None:
            return
        self._compare(path)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                start = Event(step=self._step, session_log=SessionLog(status=SessionLog.START))
                logger.experiment._get_file_writer().add_event(start, self._step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save it beside the checkpoints, as not every logger has a folder for each run."""
        if self._is_saved:
            return
        self._is_saved = True
        folder = run_folder(trainer)  # in all processes: it is broadcast
        if not trainer.is_global_zero:
            return
        get_filesystem(folder).makedirs(folder, exist_ok=True)
        path = f"{folder}/{self.config_filename}"
        self.parser.save(self.config, path, skip_none=False, overwrite=True)
        self.save_config(trainer, pl_module, "fit")

    def _compare(self, path: Path) -> None:
        changes = [change for change in _changed(path, self.parser, self.config) if not change[0].startswith(_FREE)]
        said = [f"{name} {_short(old)} (now {_short(new)})" for name, old, new in changes]
        if barred := [text for (name, *_), text in zip(changes, said, strict=True) if name.endswith(_STATEFUL)]:
            raise ValueError(
                f"the run in {path.parent} was begun with {barred[0]}, which cannot go on from its state; take that of "
                "then, or begin a new run without --resume and --ckpt_path"
            )
        if said:
            more = f" and {len(said) - 4} more" if len(said) > 4 else ""
            held = "; numbers of optimizer and schedule stay those of then" if _is_held(changes) else ""
            rank_zero_warn(f"this run was begun with other settings: {', '.join(said[:4])}{more}{held}")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the text."""
        config = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()))


def check_same_run(checkpoint: Path, parser: Any, config: Any) -> None:
    """Check that seed, data and model of a run are those that it was started with.

    Other settings may differ: the number of epochs or steps, loggers, callbacks, devices, limits of batches, and the
    data's folder, workers and memory.

    Args:
        checkpoint: The run's checkpoint, in its folder.
        parser: The command line's parser.
        config: The settings now.

    Raises:
        ValueError: If they differ.
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
            f"--resume found {checkpoint}, whose run has other settings: {', '.join(changes[:3])}{more}; leave out "
            f"--resume, give this run its own --name, or continue that run all the same with --ckpt_path {checkpoint}"
        )


def _changed(path: Path, parser: Any, config: Any) -> list[tuple[str, Any, Any]]:
    """Return name, old and new value of each setting that differs from a saved config; nothing if there is none."""
    try:
        begun = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return list(_changes(begun, yaml.safe_load(parser.dump(config, skip_none=False))))


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings that both configs have, and that differ: name, old and new value."""
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
