"""Summary printed at the end of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from lkd.callbacks.checkpoint import BestCheckpoint
from lkd.callbacks.features import FeatureEvaluation
from lkd.datamodules.limits import Evaluated, images_measured, is_limited
from lkd.tasks import Classification, Task


class FitReport(L.Callback):
    """Print a summary at the end of `fit`: teacher, student (best and last), gap, and where to find the results.

    If the loss does not train the logits, the table shows the student's distillation loss instead of accuracies.

    In TensorBoard, the hyperparameters are logged with these values as `final/...` (tab HParams).
    """

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        """Return the measured values, for a run that is resumed after its last epoch."""
        return self._measured

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the interrupted run."""
        self._measured = dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record that training started."""
        self._trained = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Store the final metrics before the last checkpoint is saved."""
        self._measured = {**self._measured, **_metrics(trainer, pl_module)}

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the summary table and log the final metrics."""
        metrics = {**self._measured, **_metrics(trainer, pl_module)}
        if not metrics and _main_metric(pl_module) is not None and _best_checkpoint(trainer) is None:
            return
        if trainer.progress_bar_callback is not None:  # it would overwrite the following output
            trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
        console = Console(soft_wrap=True)
        if not self._trained and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            done = f"{trainer.current_epoch} epochs and {trainer.global_step} steps"
            more = "increase --trainer.max_epochs to continue"
            console.print(f"nothing left to train: this run has already completed {done}; {more}")
        if metrics:
            console.print(_table(pl_module, metrics, images_measured(trainer, "val")))
        for line in _where(trainer):
            console.print(line, highlight=False, markup=False)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                final = {f"final/{name}": value for name, value in metrics.items()}
                settings = {name.lstrip("_"): value for name, value in pl_module.hparams_initial.items()}
                settings.pop("instantiator", None)  # Lightning's description of how to re-create the module
                logger.log_hyperparams(settings, final, trainer.global_step)

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Print the command that resumes an interrupted run."""
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            last = [
                path for callback in trainer.checkpoint_callbacks if (path := _path(callback)).endswith("last.ckpt")
            ]
            how = f"resume with: lkd fit --ckpt_path {shlex.quote(last[0])}" if last else "no checkpoint was saved yet"
            Console(soft_wrap=True).print(f"interrupted in epoch {trainer.current_epoch}; {how}", highlight=False)


class LimitReport(L.Callback):
    """Print the number of images evaluated by a limited validation or test."""

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the number of images before Lightning's table."""
        _report_limit(trainer, "val")

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the number of images before Lightning's table."""
        _report_limit(trainer, "test")


def _report_limit(trainer: L.Trainer, split: Evaluated) -> None:
    if is_limited(trainer, split):
        Console(soft_wrap=True).print(f"evaluated on {images_measured(trainer, split)}", highlight=False)


def _path(callback: L.Callback) -> str:
    return str(getattr(callback, "best_model_path", ""))


def _main_metric(module: Any) -> str | None:
    name: str | None = getattr(module, "main_metric", "acc")
    return name


def _scored_task(module: Any) -> Task | None:
    """Return the task whose metric is the main metric; `None` if the main metric is the distillation loss."""
    task: Task = getattr(module, "task", None) or Classification()
    return task if _main_metric(module) == task.metric else None


def _metrics(trainer: L.Trainer, module: Any) -> dict[str, float]:
    """Return the student's main validation metric, the teacher's accuracy, and feature metrics, if measured."""
    measured, best, name = trainer.callback_metrics, _best_checkpoint(trainer), _main_metric(module)
    metrics = {
        f"teacher_{name}": measured.get(f"val/teacher_{name}"),
        f"best_{name}": best.best_model_score if best and best.monitor == f"val/{name}" else None,
        f"last_{name}": measured.get(f"val/{name}"),
        **{curve.removeprefix("val/"): measured.get(curve) for curve in _feature_curves(trainer)},
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _feature_curves(trainer: L.Trainer) -> list[str]:
    """Return the names of the metrics of callbacks that evaluate features."""
    evaluations = [one for one in trainer.callbacks if isinstance(one, FeatureEvaluation)]  # type: ignore[attr-defined]
    return [curve for one in evaluations for curve in one.curves]


def _best_checkpoint(trainer: L.Trainer) -> ModelCheckpoint | None:
    """Return the callback that saved the best checkpoint; `None` if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.best_model_path:
            continue
        if callback.monitor or isinstance(callback, BestCheckpoint):
            return callback
    return None


def _table(module: Any, metrics: dict[str, float], images: str) -> Table:
    network, name = module.network_names[0], _main_metric(module)
    task = _scored_task(module)
    table = Table("", f"{task.metric_title} on {images}" if task else f"distillation loss (val/{name}) on {images}")
    rows = {"teacher": f"teacher_{name}", f"{network} (best)": f"best_{name}", f"{network} (last)": f"last_{name}"}
    for label, row in rows.items():
        if row in metrics:
            table.add_row(label, task.formatted(metrics[row]) if task else f"{metrics[row]:.4g}")
    for row in sorted({*metrics} - {*rows.values()}):  # metrics of evaluated features
        table.add_row(f"{network} (last), val/{row}", f"{metrics[row]:.2%}")
    if task and {f"teacher_{name}", f"best_{name}"} <= set(metrics):
        gap = metrics[f"best_{name}"] - metrics[f"teacher_{name}"]
        table.add_row("gap to teacher", task.formatted_difference(gap))
    return table


def _where(trainer: L.Trainer) -> list[str]:
    lines = []
    checkpoint = _best_checkpoint(trainer)
    if checkpoint is not None:
        path = checkpoint.best_model_path
        path = str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path
        lines += [f"Checkpoint:  {path}", f"Evaluate:    lkd test --ckpt_path {shlex.quote(path)}"]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            lines.append(f"TensorBoard: tensorboard --host localhost --logdir {shlex.quote(str(logger.root_dir))}")
        elif isinstance(logger, CSVLogger):
            lines.append(f"Metrics:     {logger.log_dir}/metrics.csv")
    return lines
