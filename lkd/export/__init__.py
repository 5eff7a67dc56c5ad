"""`lkd export`: a trained network's files for use without lkd, each checked against its checkpoint."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import lightning as L
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lkd.__about__ import __version__
from lkd.cli.arguments import check_option
from lkd.export.card import CARD, card
from lkd.export.files import INT8_FILE, METADATA, WRITERS, Network, as_json, check_formats, write_int8
from lkd.export.images import batches, preprocessing, test_loader, training_images
from lkd.export.measure import Checked, compare
from lkd.loading import Trained, find_checkpoint, load_trained
from lkd.types import Batch

TOLERANCE = 1e-4
"""By how much logits of a float32 file may differ from the checkpoint's."""
PREPROCESSING = f"{METADATA}.json"
_OWN = (CARD, PREPROCESSING, INT8_FILE, *(file for file, _ in WRITERS.values()))
"""What names in an export begin with: ONNX may keep large weights in `model.onnx.data`."""


class Export(NamedTuple):
    """What has been written, and how it compares.

    Attributes:
        folder: Where it lies.
        metrics: What `lkd test` says of the checkpoint.
        files: Each file against the checkpoint, on the same images.
    """

    folder: Path
    metrics: Mapping[str, float]
    files: Sequence[Checked]


def export(
    place: str,
    output: str | Path | None = None,
    formats: Sequence[str] = tuple(WRITERS),
    int8: bool = False,
    license: str = "unknown",
    images: int = 10_000,
    overwrite: bool = False,
    settings: Sequence[str] = (),
) -> Export:
    """Write a trained network for use without lkd.

    The folder has a file for each format, `preprocessing.json` (which is in each file too) and a model card. Each file
    is read again and answers the test images, in the data's batches and one by one; where a float32 file's logits
    differ from the checkpoint's by more than `TOLERANCE`, nothing is left.

    Args:
        place: A checkpoint; a run's folder, or that of all runs of one name, for the newest one's best.
        output: The folder; by default `export` in the run's own.
        formats: `safetensors` (weights), `torch` (a program for `torch.export.load`), `onnx`.
        int8: Whether there shall be an ONNX file of 8 bits too, calibrated on training images.
        license: The network's license, as Hugging Face calls it (`apache-2.0`).
        images: How many test images files are compared on at most; they are evenly spread.
        overwrite: Whether an export that is there is replaced.
        settings: Changes of the run's config, as on the command line: `--KEY=VALUE`.

    Returns:
        Where it lies, and what was measured.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no config beside it.
        ValueError: If the network cannot be written so, or a file does not answer as the checkpoint does.
        TypeError: If the network takes more than one tensor.
    """
    check_formats(formats, int8)
    if images < 1:
        raise ValueError(f"--images takes a number of test images from 1 on, got {images}")
    path = find_checkpoint(place)
    folder = Path(output) if output else _beside(path)
    _check_place(folder, overwrite)
    trained = load_trained(str(path), *settings)
    metrics = _tested(trained)
    with _whole(folder) as written:
        loader = test_loader(trained.data, images)
        first = next(iter(batches(loader, trained.data, trained.module))).input
        network = Network(trained.module, first)
        facts = preprocessing(trained.data, first, network.num_outputs) | {"license": license, "lkd": __version__}
        (written / PREPROCESSING).write_text(as_json(facts), encoding="utf-8")
        runs = {
            file: write(network, written / file, as_json(facts)) for file, write in map(WRITERS.__getitem__, formats)
        }
        if int8:
            calibration = training_images(trained.data, trained.module)
            runs[INT8_FILE] = write_int8(written / WRITERS["onnx"][0], written / INT8_FILE, calibration)
        checked = compare(network, runs, _shown(batches(loader, trained.data, trained.module), len(loader)), written)
        _refuse(checked)
        (written / CARD).write_text(card(trained, network, facts, metrics, checked), encoding="utf-8")
    return Export(folder, metrics, checked)


def main(args: Sequence[str]) -> None:
    """Write a trained network's files and say how they compare with the checkpoint.

    Args:
        args: The arguments behind `lkd export`: a checkpoint or the folder of a run, options, settings of the run.

    Raises:
        ValueError: If the place or an option is missing or wrong, or a file does not answer as the checkpoint does.
    """
    if not args or args[0].startswith("-"):
        raise ValueError("lkd export needs a checkpoint, or the folder of a run, first; see 'lkd export --help'")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--format", action="append", default=[])
    parser.add_argument("--output")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--license", default="unknown")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--overwrite", action="store_true")
    given, rest = parser.parse_known_args(list(args[1:]))
    for arg in rest:
        check_option("export", arg, [action.option_strings[0] for action in parser._actions])
    formats = list(dict.fromkeys(chain.from_iterable(text.split(",") for text in given.format))) or list(WRITERS)
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"lkd export takes one checkpoint, and several formats with commas between, got {rest[0]!r}")
    options = (given.output, formats, given.int8, given.license, given.images, given.overwrite)
    done = export(args[0], *options, settings=rest)
    _print(done)


def _beside(checkpoint: Path) -> Path:
    """The folder `export` in that of a checkpoint's run."""
    run = checkpoint.absolute().parent
    folder = (run.parent if run.name == "checkpoints" else run) / "export"
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _check_place(folder: Path, overwrite: bool) -> None:
    """See that nothing is lost.

    Raises:
        ValueError: If something else would have to go.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / PREPROCESSING).is_file():
        raise ValueError(f"{folder} is there, and no export of lkd's; give a new folder as --output")
    if foreign := sorted(path.name for path in folder.iterdir() if not path.name.startswith(_OWN)):
        raise ValueError(f"{folder} has {foreign[0]!r}, which is no export's; give a new folder as --output")
    if not overwrite:
        raise ValueError(f"{folder} has an export already; give another --output, or --overwrite to replace it")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Write a folder that is there whole or not at all, in place of an older one.

    Args:
        folder: The folder.

    Yields:
        Where to write: a new folder beside it.
    """
    folder = folder.resolve()  # a link stays
    written, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{part}") for part in ("new", "old"))
    written.mkdir(parents=True)
    try:
        yield written
        if folder.exists():
            folder.rename(old)
        try:
            written.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _tested(trained: Trained) -> dict[str, float]:
    """What `lkd test` measures, on all test images; module and data are then on the CPU, without a trainer."""
    trainer = L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (metrics,) = trainer.test(trained.module, datamodule=trained.data, verbose=False)
    trained.module.cpu().eval()
    trained.module.trainer = trained.data.trainer = None
    return dict(metrics)


def _shown(found: Iterable[Batch], total: int) -> Iterable[Batch]:
    """Batches, with a bar for those who look on."""
    console = Console(stderr=True)
    return track(found, "comparing", total, transient=True, console=console, disable=not console.is_terminal)


def _refuse(checked: Sequence[Checked]) -> None:
    """Let no float32 file pass that answers otherwise.

    Raises:
        ValueError: If one does.
    """
    for one in checked:
        if one.file != INT8_FILE and not one.difference <= TOLERANCE:
            raise ValueError(
                f"{one.file} does not answer as the checkpoint does: over {one.images} test images logits differ by up "
                f"to {one.difference:.2g}, {TOLERANCE:g} is allowed, and nothing is exported; another --format may do"
            )


def _print(done: Export) -> None:
    table = Table("file", "bytes", "logits differ by", "same class", "accuracy")
    for one in done.files:
        row = (f"{one.size:,}", f"{one.difference:.2g}", f"{one.agreement:.2%}", f"{one.accuracy:.2%}")
        table.add_row(one.file, *row)
    console = Console(soft_wrap=True)
    console.print(table)
    first, sizes = done.files[0], {one.file: one.size for one in done.files}
    said = [f"on {first.images:,} test images; the checkpoint's accuracy there is {first.expected_accuracy:.2%}"]
    if INT8_FILE in sizes:
        points = 100 * (done.files[-1].accuracy - first.expected_accuracy)
        share = sizes[INT8_FILE] / sizes[WRITERS["onnx"][0]]
        said.append(f"8 bits:   {points:+.2f} points of accuracy, {share:.2f} times the bytes")
    for line in [*said, f"export:   {done.folder}", f"its card: {done.folder / CARD}"]:
        console.print(line, highlight=False, markup=False)
