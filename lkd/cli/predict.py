"""`lkd predict`: predictions of a trained network for the test images, or for the images of a folder."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from lkd.callbacks import PredictionWriter
from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.datamodules import new_images


class _PredictCLI(LkdCLI):
    """CLI that writes predictions.

    Args:
        args: Arguments after `lkd`, without `--images` and `--output`.
        name: Name of the run.
        images: Folder of new images; if `None`, the test images of the data module are predicted.
        output: Parent of the new folder with the predictions.
    """

    def __init__(self, args: Sequence[str], name: str, images: str | None, output: str) -> None:
        self.images, self.output = images, output
        super().__init__(args, name)

    def before_instantiate_classes(self) -> None:
        """Disable `return_predictions` by default, because Lightning would keep all predictions in memory."""
        super().before_instantiate_classes()
        config = self.config["predict"]
        config.return_predictions = bool(config.return_predictions)

    def after_instantiate_classes(self) -> None:
        """Replace the data module if a folder of images is given, and add the writer."""
        super().after_instantiate_classes()
        if self.images is not None:
            self.datamodule = new_images(self.images, self.datamodule)
        self.trainer.callbacks.append(PredictionWriter(self.output))  # type: ignore[attr-defined]


def main(args: Sequence[str]) -> None:
    """Predict images and write the predictions.

    Args:
        args: Arguments after `lkd`: the command, followed by its options.
    """
    parser = ArgumentParser(prog="lkd", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--images")
    parser.add_argument("--output", default="runs/predict")
    given, rest = parser.parse_known_args(args)
    prepared = prepare(rest)
    _PredictCLI(prepared.args, prepared.name, given.images, given.output)
