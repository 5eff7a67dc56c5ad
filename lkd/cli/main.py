"""Run a command, and report errors in one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
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
    """Run a command.

    Args:
        args: Arguments after `lkd`: the command, followed by its options.

    Returns:
        Exit code: 0 on success, 2 after a user error, 143 after SIGTERM, 1 if another process of the run has ended.
    """
    debug = "--debug" in args or os.environ.get("LKD_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # to import the user's classes; console scripts do not add it
    _quieten()
    try:
        if args[0] in OWN:
            copy_context().run(import_module(OWN[args[0]]).main, args[1:])  # they use LkdCLI
        elif args[0] == "fit" and any(arg.partition("=")[0] == "--seeds" for arg in args):
            from lkd.cli.seeds import fit_seeds  # it uses LkdCLI

            return fit_seeds(args[1:], debug)
        else:
            # A copied context, because jsonargparse keeps the parser, and thus the whole run, in a context variable.
            with bound_to_parent():
                if args[0] == "predict":
                    copy_context().run(import_module("lkd.cli.predict").main, args)
                else:
                    copy_context().run(LkdCLI, *prepare(args))
    except SIGTERMException:  # a SystemExit with code 0, which would signal success
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
    """Return whether W&B or MLflow raised an exception, such as for a missing login or an unreachable server."""
    return type(error).__module__.partition(".")[0] in ("wandb", "mlflow")


_KNOWN = (  # warnings of Lightning and PyTorch that do not indicate a problem in lkd
    ".*does not have many workers.*",
    ".*treespec, LeafSpec.*",
    ".*in eval mode at the start of training.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*The dirpath has changed from.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Total length of `list` across ranks is zero.*",  # val_size: 0
    ".*Your `IterableDataset` has `__len__` defined.*",  # WebDatasetDataModule, which splits the data between workers
    ".*Couldn't infer the batch indices fetched from your dataloader.*",  # lkd's batches contain the indices
    ".*all_gather is deprecated.*",
    ".*WeightAveraging callback with a model that overrides the configure_model.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*not yet implemented the batching rule.*",  # a criterion evaluated per sample
)


def _quieten() -> None:
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")  # rank 0 shows the warnings
    warnings.formatwarning = lambda message, *_, **__: f"lkd: warning: {message}\n"
