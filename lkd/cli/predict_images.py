"""`lkd predict --images FOLDER`: the predictions of a trained network for images of one's own."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.datamodules import NewImages


class _PredictNewImages(LkdCLI):
    """`lkd predict` with the images of a folder in place of the run's test images.

    Args:
        folder: The folder.
        args: The other arguments behind `lkd`.
        name: The run's name.
    """

    def __init__(self, folder: str, args: Sequence[str], name: str) -> None:
        self.folder = folder
        super().__init__(args, name)

    def after_instantiate_classes(self) -> None:
        """Prepare the new images as the run's data module prepares its own."""
        super().after_instantiate_classes()
        self.datamodule = NewImages(self.folder, self.datamodule)


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: The arguments behind `lkd`, the command first.
    """
    parser = ArgumentParser(prog="lkd", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--images", required=True)
    given, rest = parser.parse_known_args(args)
    prepared = prepare(rest)
    _PredictNewImages(given.images, prepared.args, prepared.name)
