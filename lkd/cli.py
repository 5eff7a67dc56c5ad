"""The command line: Lightning's CLI with lkd's defaults, and its answers to mistakes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse._typehints as typehints
import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from jsonargparse._util import NestedArg, import_object
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from lkd.arguments import newest_checkpoint, prepare, run_version
from lkd.callbacks import (
    EpochLines,
    FitReport,
    ImagesPerSecond,
    LimitReport,
    MonitorCheck,
    NetworkSummary,
    PredictionWriter,
    ProgressBar,
    RunRecord,
    StepSeed,
)
from lkd.callbacks.speed import fitting_precision
from lkd.help import OWN
from lkd.losses import DistillLoss
from lkd.mistakes import CALLBACKS, explain, is_no_curve
from lkd.plain_yaml import load_yaml
from lkd.processes import LostProcessError, bound_to_parent, lost, speaker
from lkd.run_config import SaveConfig, check_same_run
from lkd.run_folder import RunFolder, described

_MISTAKES = (ArgumentError, MisconfigurationException, OSError, TypeError, ValueError, yaml.YAMLError)


class LkdCLI(LightningCLI):
    """`lkd fit | validate | test | predict`.

    Args:
        args: The arguments behind `lkd`.
        name: The run's name: its folder below `runs/`.
        resumes: Whether the checkpoint must be that of a run with the same settings.
    """

    def __init__(self, args: Sequence[str], name: str, resumes: bool = False) -> None:
        self.args, self.run_name, self.resumes = list(args), name, resumes
        self._folder = RunFolder()
        quiet = {"exit_on_error": False, "allow_abbrev": False}
        with self._folder:
            super().__init__(
                model_class=L.LightningModule,
                datamodule_class=L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},  # some loggers have no new folder for each run
                # the whole validation split before the first epoch: how good is the teacher?
                trainer_defaults={"num_sanity_val_steps": -1, "enable_model_summary": False},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={**quiet, **{command: dict(quiet) for command in self.subcommands()}},
                args=self.args,
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning about `args`: `main` gets them, not `sys.argv`."""
        changes: dict[str, Callable[..., Any]] = {
            "discard_init_args_on_class_path_change": _discard,
            "parse_value_or_config": _keep_null,
        }
        own = {name: getattr(typehints, name) for name in changes}
        read = get_loader("yaml")
        set_loader("yaml", lambda text: load_yaml(text, read), (yaml.YAMLError,))
        for name, change in changes.items():
            setattr(typehints, name, partial(change, own[name]))
        try:
            self.config = parser.parse_args(args)
        finally:
            set_loader("yaml", read, (yaml.YAMLError,))
            for name, function in own.items():
                setattr(typehints, name, function)

    def _parse_ckpt_path(self) -> None:
        """The config's word holds: Lightning would let the checkpoint's hyperparameters override it."""

    def before_instantiate_classes(self) -> None:
        """Find the weights that are taken from a run's folder; without any, there is nothing to measure."""
        config = self.config[self.subcommand]
        own = config.get("model", {}).get("init_args", {})
        for name in ("model_ckpt", "student_ckpt", "teacher_ckpt"):
            if own.get(name) and Path(own[name]).is_dir():  # resolved before the config is saved, which names the file
                own[name] = str(newest_checkpoint(Path(own[name]), "best"))
                rank_zero_only(print)(f"{name.removesuffix('_ckpt')}: {described(Path(own[name]))}")
        if self.resumes:
            check_same_run(Path(config["ckpt_path"]), self._parser("fit"), config)
        trained = config.get("ckpt_path") or own.get("model_ckpt") or own.get("student_ckpt")
        trained = trained or "lkd.models.load_weights" in str(own.get("model"))  # an ensemble's members bring theirs
        if self.subcommand != "fit" and not trained:
            raise ValueError(
                f"lkd {self.subcommand} needs a checkpoint: give --ckpt_path FILE, or the weights of someone else's "
                "network as --model.init_args.model_ckpt FILE (student_ckpt for a DistillModule)"
            )
        path = own.get("teacher_ckpt")
        self.alone = self.subcommand != "fit" and bool(path) and not (Path(path).is_file() or path.startswith("lkd:"))
        if self.alone:
            own["teacher_ckpt"] = None
            rank_zero_warn(f"there is no {path}, so the student is measured alone, without its teacher")

    def after_instantiate_classes(self) -> None:
        """A teacher without its weights is not measured."""
        if self.alone:
            self.model.network_names = ("student",)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add lkd's own settings."""
        for section, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, section)
        parser.add_argument("--name", type=str | None, help="The run's name: its folder is runs/NAME/version_N.")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if reason := lost(error, self.trainer):
                raise LostProcessError(f"{reason}, so the run cannot go on") from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, with a TensorBoard logger for fit unless the config says otherwise, and lkd's callbacks."""
        fit = self.subcommand == "fit"
        config = self._get(self.config_init, "trainer")
        if fit:
            root = config.get("default_root_dir") or "runs"
            logger = self._run_logger(root, not config.get("fast_dev_run"))
            if config.get("logger") is False:
                kwargs["default_root_dir"] = logger.log_dir
            elif not config.get("default_root_dir"):  # loggers without a folder of their own write there
                kwargs["default_root_dir"] = root
            for section in ("checkpoint", "last_checkpoint"):  # whatever the loggers, a run is in one folder
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
        forks = any(word in str(config.get("strategy")) for word in ("fork", "notebook"))  # they want CUDA untouched
        if fit and config.get("precision") is None and not config.get("plugins") and not forks:
            config["precision"] = kwargs["precision"] = self._precision(config)
        if fit and config.get("benchmark") is None and not config.get("deterministic"):
            # Batches of one size: cuDNN's search for the fastest convolutions pays within seconds.
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
        """Return the logger of a new run's folder, or of the resumed run's, which is locked from here on."""
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
        self.config[self.subcommand].trainer.precision = precision  # the saved config tells it
        return precision


def _discard(keep: Callable[..., None], parser: Any, old: Any, new: Any) -> None:
    """Where a config names another class, settings of the old one must not go over to the new one in silence.

    jsonargparse keeps those that both have. For a module or data module that is wanted (`--model mine.Mine`); an
    optimizer, a schedule or a criterion begins with its own defaults.
    """
    keep(parser, old, new)
    if old and "init_args" in old and old["class_path"] != new["class_path"]:
        kind = import_object(old["class_path"])
        if isinstance(kind, type) and issubclass(kind, (Optimizer, LRScheduler, DistillLoss)):
            for name in list(vars(old["init_args"])):
                old["init_args"].pop(name)


def _keep_null(parse: Callable[..., Any], value: Any, **settings: Any) -> Any:
    """Hand `null` down as it was written.

    jsonargparse hands a setting of a class inside of a class on as the text of what it has read of it: 'None', which is
    a text like any other for an argument that takes text or null.
    """
    parsed, path = parse(value, **settings)
    goes_on = isinstance(parsed, NestedArg) and "." in parsed.key
    return (value if goes_on and None in tree_leaves(parsed.val) else parsed), path


def _callbacks(command: str, logged: bool) -> list[L.Callback]:
    if command == "predict":
        return [PredictionWriter()]
    if command != "fit":
        return [LimitReport()]
    callbacks: list[L.Callback] = [MonitorCheck(), NetworkSummary(), ImagesPerSecond(), FitReport(), StepSeed()]
    return [*callbacks, LearningRateMonitor()] if logged else callbacks


def run(args: Sequence[str]) -> int:
    """Run one command.

    Args:
        args: The arguments behind `lkd`, the command first.

    Returns:
        The exit code: 0, 2 after a mistake that the user can mend, 143 after SIGTERM, 1 where another process has
        ended.
    """
    debug = "--debug" in args or os.environ.get("LKD_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script would not find the user's own classes
    _quieten()
    try:
        if args[0] in OWN:
            copy_context().run(import_module(OWN[args[0]]).main, args[1:])  # they use LkdCLI
        elif args[0] == "fit" and any(arg.partition("=")[0] == "--seeds" for arg in args):
            from lkd.seeds import fit_seeds  # it uses LkdCLI

            return fit_seeds(args[1:], debug)
        elif args[0] == "predict" and any(arg.partition("=")[0] == "--images" for arg in args):
            copy_context().run(import_module("lkd.new_images").main, args)
        else:
            # In a context of its own: jsonargparse leaves the parser, and with it the whole run, in a context variable.
            # In predict each process goes its own way.
            with nullcontext() if args[0] == "predict" else bound_to_parent():
                copy_context().run(LkdCLI, *prepare(args))
    except SIGTERMException:  # a SystemExit with code 0: what waits for the run would take it for done
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug or not (
            isinstance(error, (*_MISTAKES, LostProcessError)) or _is_a_loggers(error) or is_no_curve(error)
        ):
            raise
        print(f"lkd: error: {speaker()}{' '.join(explain(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, LostProcessError) else 2
    return 0


def _is_a_loggers(error: Exception) -> bool:
    """Whether W&B or MLflow has raised it: no login, no server, no place to write."""
    return type(error).__module__.partition(".")[0] in ("wandb", "mlflow")


_KNOWN = (  # what Lightning warns of in every run, though all is as it should be
    ".*does not have many workers.*",
    ".*treespec, LeafSpec.*",
    ".*in eval mode at the start of training.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*The dirpath has changed from.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Total length of `list` across ranks is zero.*",  # val_size: 0
    ".*Your `IterableDataset` has `__len__` defined.*",  # WebDatasetDataModule, whose workers know their shares
    ".*Couldn't infer the batch indices fetched from your dataloader.*",  # its batches have them
    ".*all_gather is deprecated.*",
    ".*WeightAveraging callback with a model that overrides the configure_model.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*not yet implemented the batching rule.*",  # a criterion read sample by sample
)


def _quieten() -> None:
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that this machine has no CUDA
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")  # the first of several processes has issued it
    warnings.formatwarning = lambda message, *_, **__: f"lkd: warning: {message}\n"
