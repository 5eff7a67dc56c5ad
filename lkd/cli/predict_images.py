"""`lkd predict --images FOLDER`: predictions of a trained network for new images."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.datamodules import NewImages


class _PredictNewImages(LkdCLI):
    """`lkd predict` with the images of a folder instead of the test images.

    Args:
        folder: Folder of images.
        args: Other arguments after `lkd`.
        name: Name of the run.
    """

    def __init__(self, folder: str, args: Sequence[str], name: str) -> None:
        self.folder = folder
        super().__init__(args, name)

    def after_instantiate_classes(self) -> None:
        """Replace the data module by one that preprocesses the new images in the same way."""
        super().after_instantiate_classes()
        self.datamodule = NewImages(self.folder, self.datamodule)


def main(args: Sequence[str]) -> None:
    """Predict the images of a folder.

    Args:
        args: Arguments after `lkd`: the command, followed by its options.
    """
    parser = ArgumentParser(prog="lkd", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--images", required=True)
    given, rest = parser.parse_known_args(args)
    prepared = prepare(rest)
    _PredictNewImages(given.images, prepared.args, prepared.name)
