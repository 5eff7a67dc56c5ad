"""What a run has left: its module with the checkpoint's weights, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor, nn

from lkd.checkpoints.find import config_of, in_folder, read_checkpoint
from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.modules import ClassificationModule, EarlyExitModule


class Trained(NamedTuple):
    """A checkpoint, and what its run was made of.

    Attributes:
        path: The checkpoint.
        checkpoint: Its content.
        config: The run's settings, as `lkd fit` saved them.
        module: The run's module with the checkpoint's weights, in eval mode, on the CPU.
        data: The run's data module.
    """

    path: Path
    checkpoint: dict[str, Any]
    config: Any
    module: ClassificationModule
    data: L.LightningDataModule


class Answer(nn.Module):
    """A module's own answer, where that is not its network's alone: SimKD's student has the teacher's classifier.

    Args:
        module: The module.
    """

    def __init__(self, module: ClassificationModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Any) -> Tensor:
        """Logits `(B, K)`."""
        logits: Tensor = self.module(input)
        return logits


class _Rebuilt(LkdCLI):
    """Builds a run's module and data, and runs nothing."""

    def _set_seed(self) -> None:
        """The caller's random numbers stay as they are."""

    def instantiate_trainer(self, **_: Any) -> Any:
        """None: nothing runs."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def find_checkpoint(place: str) -> Path:
    """The checkpoint that a place stands for.

    Args:
        place: A checkpoint; a run's folder, or that of all runs of one name, for the newest one's best.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"there is no {place}; give a checkpoint, or the folder of a run or of runs")
    return in_folder(path, "best")


def load_trained(place: str, *settings: str) -> Trained:
    """Rebuild what a run has trained, from its config and its checkpoint.

    Args:
        place: A checkpoint; a run's folder, or that of all runs of one name, for the newest one's best.
        settings: Changes of the run's config, as on the command line: `--config=FILE`, `--KEY=VALUE`.

    Returns:
        The module with the checkpoint's weights, its data, and where they come from.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no config beside it.
        ValueError: If it is no checkpoint, or not this config's.
    """
    path = find_checkpoint(place)
    cli = _Rebuilt(*prepare(["test", f"--config={config_of(path)}", f"--ckpt_path={path}", *settings]))
    checkpoint = dict(read_checkpoint(path))
    module = cli.model
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return Trained(path, checkpoint, cli.config["test"], module.eval(), cli.datamodule)


def network_of(module: ClassificationModule) -> nn.Module:
    """What answers, in a module that has been trained.

    Args:
        module: The module.

    Returns:
        Its network, which returns logits `(B, K)`; or the module behind an `Answer`.
    """
    alone = type(module).forward is ClassificationModule.forward
    alone = alone or (isinstance(module, EarlyExitModule) and module.exit is None)
    return module.model if alone else Answer(module)
