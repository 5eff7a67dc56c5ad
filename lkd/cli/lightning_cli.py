"""Lightning's CLI with the defaults and callbacks of lkd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lkd._compat import CLIHooks, changed_parser, import_class, nested_value, parser_of, tree_leaves
from lkd.callbacks import (
    EpochLines,
    FitReport,
    ImagesPerSecond,
    LimitReport,
    MonitorCheck,
    NetworkSummary,
    ProgressBar,
    RunRecord,
    StepSeed,
)
from lkd.callbacks.config import SaveConfig, check_same_run
from lkd.callbacks.speed import fitting_precision
from lkd.checkpoints.find import newest_checkpoint, run_version
from lkd.cli.errors import CALLBACKS
from lkd.cli.processes import LostProcessError, lost
from lkd.cli.run_folder import RunFolder, described
from lkd.io.yaml import load_yaml
from lkd.losses import DistillLoss


class LkdCLI(CLIHooks, LightningCLI):
    """Lightning CLI for `lkd fit`, `validate`, `test` and `predict`.

    Args:
        args: Arguments after `lkd`.
        name: Name of the run, which is also its folder below `runs/`.
        resumes: Whether to require that the checkpoint is from a run with the same settings.
        until: Last stage: `parsed` (settings only), `built` (module and data module, without a trainer), `ready` (with
            a trainer), or `run`. The first two leave the random state of the process unchanged.
        needs_data: Whether a data module is required.
    """

    def __init__(
        self,
        args: Sequence[str],
        name: str,
        resumes: bool = False,
        until: Literal["parsed", "built", "ready", "run"] = "run",
        needs_data: bool = True,
    ) -> None:
        self.args, self.run_name, self.resumes = list(args), name, resumes
        self._until, self._needs_data = until, needs_data
        self._folder = RunFolder()
        quiet = {"exit_on_error": False, "allow_abbrev": False}
        command = self.args[0]
        chosen = {command: self.subcommands()[command]}
        self.subcommands = lambda: chosen  # type: ignore[method-assign]  # each further parser would take 0.1 s
        with self._folder:
            super().__init__(
                model_class=L.LightningModule,
                datamodule_class=L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},  # some loggers do not create a new folder for each run
                # the whole validation split before the first epoch, to measure the teacher
                trainer_defaults={"num_sanity_val_steps": -1, "enable_model_summary": False},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={**quiet, command: quiet.copy()},
                args=self.args,
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args` with lkd's YAML loader, and without Lightning's warning that `sys.argv` is ignored."""
        read = get_loader("yaml")
        set_loader("yaml", lambda text: load_yaml(text, read), (yaml.YAMLError,))
        try:
            with changed_parser(discard_init_args_on_class_path_change=_discard, parse_value_or_config=_keep_null):
                self.config = parser.parse_args(args)
        finally:
            set_loader("yaml", read, (yaml.YAMLError,))

    def before_instantiate_classes(self) -> None:
        """Resolve weights that are given as the folder of a run, and check that there are weights to evaluate."""
        config = self.config[self.subcommand]
        own = config.get("model", {}).get("init_args", {})
        for name in ("model_ckpt", "student_ckpt", "teacher_ckpt"):
            if own.get(name) and Path(own[name]).is_dir():  # before the config is saved, so that it names the file
                own[name] = str(newest_checkpoint(Path(own[name]), "best"))
                rank_zero_only(print)(f"{name.removesuffix('_ckpt')}: {described(Path(own[name]))}")
        if self.resumes:
            check_same_run(Path(config["ckpt_path"]), self._parser("fit"), config)
        trained = config.get("ckpt_path") or own.get("model_ckpt") or own.get("student_ckpt")
        trained = trained or "lkd.models.load_weights" in str(own.get("model"))  # an ensemble of trained members
        if self.subcommand != "fit" and not trained:
            raise ValueError(
                f"lkd {self.subcommand} requires a checkpoint: give --ckpt_path FILE, or weights from elsewhere as "
                "--model.init_args.model_ckpt FILE (student_ckpt for a DistillModule)"
            )
        path = own.get("teacher_ckpt")
        self.alone = self.subcommand != "fit" and bool(path) and not (Path(path).is_file() or path.startswith("lkd:"))
        if self.alone:
            own["teacher_ckpt"] = None
            rank_zero_warn(f"teacher weights {path} not found; evaluating the student without its teacher")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of module, data module and trainer."""
        if not self._needs_data:
            self.datamodule_class = None  # Lightning then does not require one
        super().add_core_arguments_to_parser(parser)

    def seed(self, seed_everything: Callable[[], None]) -> None:
        """Seed the random number generators, unless no trainer is created."""
        if self._until in ("ready", "run"):
            seed_everything()

    def instantiate_classes(self) -> None:
        """Instantiate module, data module and trainer, unless only the settings are parsed."""
        if self._until != "parsed":
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Exclude a teacher whose weights are missing from the evaluation."""
        if self.alone and self._until != "parsed":
            self.model.network_names = ("student",)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of lkd's callbacks, and `--name`."""
        for section, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, section)
        parser.add_argument("--name", type=str | None, help="Name of the run, which is saved in runs/NAME/version_N.")

    def resolved(self) -> dict[str, Any]:
        """Return the settings of the subcommand as plain values."""
        command = str(self.subcommand)
        text = parser_of(self, command).dump(self.config[command], skip_none=False, skip_validation=True)
        settings: dict[str, Any] = yaml.safe_load(text)
        return settings

    def run_command(self, run: Callable[[], None]) -> None:
        """Run the subcommand, and explain the loss of another process."""
        if self._until != "run":
            return
        try:
            run()
        except RuntimeError as error:
            if reason := lost(error, self.trainer):
                raise LostProcessError(f"{reason}, so the run cannot continue") from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Create the trainer, with lkd's callbacks and, for `fit`, a TensorBoard logger unless the config sets one."""
        if self._until == "built":
            return cast("L.Trainer", None)
        fit, config = self.subcommand == "fit", self._get(self.config_init, "trainer")
        if fit:
            root = config.get("default_root_dir") or "runs"
            logger = self._run_logger(root, not config.get("fast_dev_run"))
            if config.get("logger") is False:
                kwargs["default_root_dir"] = logger.log_dir
            elif not config.get("default_root_dir"):  # loggers without their own folder write there
                kwargs["default_root_dir"] = root
            for section in ("checkpoint", "last_checkpoint"):  # independent of the loggers
                callback = self.config_init["fit"][section]
                callback.dirpath = callback.dirpath or f"{logger.log_dir}/checkpoints"
            if config.get("logger") in (None, True):
                kwargs["logger"] = logger
        elif config.get("logger") in (None, True):
            kwargs["logger"] = False
        logged = bool(kwargs.get("logger", config.get("logger"))) and not config.get("fast_dev_run")
        kept = config.get("enable_checkpointing") is not False
        for section in () if kept else ("checkpoint", "last_checkpoint"):
            self._parser(self.subcommand).callback_keys.remove(section)
        self.trainer_defaults["callbacks"] = _callbacks(str(self.subcommand), logged)
        forks = any(word in str(config.get("strategy")) for word in ("fork", "notebook"))  # must not initialize CUDA
        if fit and config.get("precision") is None and not config.get("plugins") and not forks:
            config["precision"] = kwargs["precision"] = self._precision(config)
        if fit and config.get("benchmark") is None and not config.get("deterministic"):
            # All batches have the same size, so cuDNN's search for the fastest convolutions pays off within seconds.
            kwargs["benchmark"] = True
        own_bar = any(isinstance(callback, L.pytorch.callbacks.ProgressBar) for callback in config["callbacks"] or [])
        if config.get("enable_progress_bar") is not False and not own_bar:
            console = Console()
            is_shown = console.is_terminal or console.is_jupyter
            self.trainer_defaults["callbacks"].append(ProgressBar() if is_shown or not fit else EpochLines())
        if fit:
            configs = self.config[self.subcommand].config or []
            self.trainer_defaults["callbacks"].append(RunRecord(self.args, [Path(str(path)) for path in configs]))
        else:
            self.save_config_callback = None
        return super().instantiate_trainer(**kwargs)

    def _run_logger(self, root: str, leaves_files: bool) -> TensorBoardLogger:
        """Return a logger for the folder of a new run, or of the resumed run; the latter is locked first."""
        path = self._get(self.config_init, "ckpt_path")
        runs = Path(root) / self.run_name
        version = run_version(Path(path), runs) if path else None
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if version is not None and first:
            self._folder.lock(runs / f"version_{version}" / "checkpoints")
        logger = TensorBoardLogger(root, self.run_name, version, default_hp_metric=False)
        if version is None and first and leaves_files and "://" not in root:
            logger = TensorBoardLogger(root, self.run_name, self._folder.reserve(runs), default_hp_metric=False)
        return logger

    def _precision(self, config: Any) -> str:
        shape = getattr(self.datamodule, "input_shape", None)
        gpu = torch.cuda.is_available() and config.get("accelerator") not in ("cpu", "mps", "tpu")
        precision: str = fitting_precision(self.model, None if shape is None else torch.zeros(1, *shape), gpu)
        self.config[self.subcommand].trainer.precision = precision  # for the saved config
        return precision


def _discard(keep: Callable[..., None], parser: Any, old: Any, new: Any) -> None:
    """Discard the settings of a class that a later config replaces with another class.

    jsonargparse keeps the settings that both classes have. This is useful for modules and data modules
    (`--model mine.Mine`), but an optimizer, schedule or criterion should start from its own defaults.
    """
    keep(parser, old, new)
    if old and "init_args" in old and old["class_path"] != new["class_path"]:
        kind = import_class(old["class_path"])
        if isinstance(kind, type) and issubclass(kind, (Optimizer, LRScheduler, DistillLoss)):
            for name in list(vars(old["init_args"])):
                old["init_args"].pop(name)


def _keep_null(parse: Callable[..., Any], value: Any, **settings: Any) -> Any:
    """Preserve `null` in the settings of nested classes.

    jsonargparse passes the parsed settings of a nested class on as text. This turns `null` into 'None', which an
    argument that accepts a string or null interprets as a string.
    """
    parsed, path = parse(value, **settings)
    nested = nested_value(parsed)
    has_null = nested is not None and "." in nested[0] and None in tree_leaves(nested[1])
    return (value if has_null else parsed), path


def _callbacks(command: str, logged: bool) -> list[L.Callback]:
    if command != "fit":
        return [] if command == "predict" else [LimitReport()]
    callbacks: list[L.Callback] = [MonitorCheck(), NetworkSummary(), ImagesPerSecond(), FitReport(), StepSeed()]
    return [*callbacks, LearningRateMonitor()] if logged else callbacks
