"""Loading of trained runs: rebuild the module with its weights, and the data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor, nn

from lkd._moved import renamed
from lkd.checkpoints.find import config_of, find_checkpoint, read_checkpoint
from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.modules import ClassificationModule, EarlyExitModule


class Trained(NamedTuple):
    """A loaded checkpoint with the config, module and data module of its run.

    Attributes:
        path: Path of the checkpoint.
        checkpoint: Content of the checkpoint.
        config: Config of the run, as saved by `lkd fit`.
        module: Module with the weights of the checkpoint, in eval mode, on the CPU.
        data: Data module of the run.
    """

    path: Path
    checkpoint: dict[str, Any]
    config: Any
    module: ClassificationModule
    data: L.LightningDataModule


class ModuleLogits(nn.Module):
    """Wrapper for modules whose logits are not those of their network alone, such as `SimKDModule`.

    Args:
        module: Module whose `forward` computes the logits.
    """

    def __init__(self, module: ClassificationModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Any) -> Tensor:
        """Compute the logits `(B, K)`."""
        logits: Tensor = self.module(input)
        return logits


def load_run(place: str, *settings: str) -> Trained:
    """Rebuild a trained module and its data module from the config and checkpoint of a run.

    Args:
        place: Path of a checkpoint; or the folder of a run, or of all runs with the same name, which selects the best
            checkpoint of the newest run.
        settings: Overrides of the config, as on the command line: `--config=FILE`, `--KEY=VALUE`.

    Returns:
        The module with the weights of the checkpoint, its data module, the config, and the checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint, or a config next to it, does not exist.
        ValueError: If the file is not a checkpoint, or does not match the config.
    """
    path = find_checkpoint(place)
    prepared = prepare(["test", f"--config={config_of(path)}", f"--ckpt_path={path}", *settings])
    cli = LkdCLI(*prepared, until="built")
    checkpoint = dict(read_checkpoint(path))
    module = cli.model
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return Trained(path, checkpoint, cli.config["test"], module.eval(), cli.datamodule)


def network_of(module: ClassificationModule) -> nn.Module:
    """Return the network that computes the logits of a trained module.

    Args:
        module: Trained module.

    Returns:
        The network of the module if it computes the logits `(B, K)` alone, otherwise a `ModuleLogits`.
    """
    alone = type(module).forward is ClassificationModule.forward
    alone = alone or (isinstance(module, EarlyExitModule) and module.exit is None)
    return module.model if alone else ModuleLogits(module)


def __getattr__(name: str) -> Any:
    """Provide former names."""
    return renamed(__name__, name)
