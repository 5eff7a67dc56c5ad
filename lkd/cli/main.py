"""Run one command, and answer mistakes with one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from contextvars import copy_context
from importlib import import_module
from pathlib import Path

import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lkd.cli.arguments import prepare
from lkd.cli.errors import explain, is_no_curve
from lkd.cli.help import OWN
from lkd.cli.lightning_cli import LkdCLI
from lkd.cli.processes import LostProcessError, bound_to_parent, speaker

_MISTAKES = (ArgumentError, MisconfigurationException, OSError, TypeError, ValueError, yaml.YAMLError)


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
            from lkd.cli.seeds import fit_seeds  # it uses LkdCLI

            return fit_seeds(args[1:], debug)
        elif args[0] == "predict" and any(arg.partition("=")[0] == "--images" for arg in args):
            copy_context().run(import_module("lkd.cli.predict_images").main, args)
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
