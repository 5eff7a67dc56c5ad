"""`lkd export`: export trained networks for use without lkd, with each file checked against the checkpoint."""

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
from lkd._compat import options_of
from lkd.checkpoints.find import find_checkpoint
from lkd.cli.arguments import check_option
from lkd.export.card import CARD, card
from lkd.export.files import INT8_FILE, METADATA, WRITERS, Network, as_json, check_formats, write_int8
from lkd.export.images import batches, preprocessing, test_loader, training_images
from lkd.export.measure import Checked, compare, percent
from lkd.loading import Trained, load_run
from lkd.tasks.base import Task
from lkd.types import Batch

TOLERANCE = 1e-4
"""Maximum absolute difference between the logits of a float32 file and those of the checkpoint."""
PREPROCESSING = f"{METADATA}.json"
_OWN = (CARD, PREPROCESSING, INT8_FILE, *(file for file, _ in WRITERS.values()))
"""Prefixes of the file names in an export. ONNX may store large weights separately in `model.onnx.data`."""


class Export(NamedTuple):
    """Result of an export.

    Attributes:
        folder: Output folder.
        metrics: Test metrics of the checkpoint, in float32.
        files: Comparison of each file with the checkpoint, on the same images.
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
    """Export a trained network for use without lkd.

    The output folder contains a file for each format, `preprocessing.json`, whose content is embedded in each file, and
    a model card. Each file is loaded again and evaluated on the test images. Its logits are also compared for some
    single images and, if the files accept other sizes, at a second image size. If any logit of a float32 file differs
    from that of the checkpoint by more than `TOLERANCE`, nothing is exported.

    Args:
        place: A checkpoint, the folder of a run, or the folder of all runs with the same name (best checkpoint of the
            newest run).
        output: Output folder; by default `export` in the folder of the run.
        formats: `safetensors` (weights), `torch` (a program for `torch.export.load`), `onnx`. The last two accept
            batches of any size. If the network returns a map of logits, they also accept images of different sizes,
            from `min_size` pixels on in steps of `size_step` pixels (see `preprocessing.json`).
        int8: Whether to export an 8-bit ONNX file as well, calibrated on training images.
        license: License of the network, as a Hugging Face identifier (`apache-2.0`).
        images: Maximum number of test images for the comparison, evenly spaced in the test set.
        overwrite: Whether to replace an existing export.
        settings: Changes to the config of the run, as on the command line: `--KEY=VALUE`.

    Returns:
        Output folder and measured results.

    Raises:
        FileNotFoundError: If the checkpoint or its config does not exist.
        ValueError: If the task does not support export, the network cannot be exported in a format, or a file does not
            reproduce the checkpoint.
        TypeError: If the network takes more than one tensor.
    """
    check_formats(formats, int8)
    if images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    path = find_checkpoint(place)
    folder = Path(output) if output else _beside(path)
    _check_output(folder, overwrite)
    trained = load_run(str(path), *settings)
    _check_task(trained.module.task)
    metrics = _tested(trained)
    with _atomic_folder(folder) as written:
        loader = test_loader(trained.data, images)
        first = next(iter(batches(loader, trained.data, trained.module))).input
        network = Network(trained.module, first, traced=set(formats) != {"safetensors"})
        facts = preprocessing(trained.data, network) | {"license": license, "lkd": __version__}
        (written / PREPROCESSING).write_text(as_json(facts), encoding="utf-8")
        runs = {
            file: write(network, written / file, as_json(facts)) for file, write in map(WRITERS.__getitem__, formats)
        }
        if int8:
            calibration = training_images(trained.data, trained.module)
            runs[INT8_FILE] = write_int8(written / WRITERS["onnx"][0], written / INT8_FILE, calibration)
        tested = _with_progress(batches(loader, trained.data, trained.module), len(loader))
        checked = compare(network, runs, tested, written)
        _check_tolerance(checked)
        (written / CARD).write_text(card(trained, network, facts, metrics, checked), encoding="utf-8")
    return Export(folder, metrics, checked)


def main(args: Sequence[str]) -> None:
    """Export a trained network, and print a comparison of the files with the checkpoint.

    Args:
        args: Arguments after `lkd export`: a checkpoint or the folder of a run, followed by options and settings of the
            run.

    Raises:
        ValueError: If an argument is missing or invalid, or a file does not reproduce the checkpoint.
    """
    if not args or args[0].startswith("-"):
        raise ValueError(
            "lkd export requires a checkpoint or the folder of a run as its first argument; see 'lkd export --help'"
        )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--format", action="append", default=[])
    parser.add_argument("--output")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--license", default="unknown")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--overwrite", action="store_true")
    given, rest = parser.parse_known_args(list(args[1:]))
    for arg in rest:
        check_option("export", arg, options_of(parser))
    formats = list(dict.fromkeys(chain.from_iterable(text.split(",") for text in given.format))) or list(WRITERS)
    if rest and not rest[0].startswith("-"):
        raise ValueError(
            f"lkd export accepts one checkpoint; separate several formats by commas; unexpected argument {rest[0]!r}"
        )
    options = (given.output, formats, given.int8, given.license, given.images, given.overwrite)
    done = export(args[0], *options, settings=rest)
    _print(done)


def _check_task(task: Task) -> None:
    """Check that networks for a task can be exported.

    Raises:
        ValueError: If they cannot.
    """
    if not task.exports:
        raise ValueError(
            f"lkd export does not support the task {type(task).__name__}; `lkd test` evaluates it, and the checkpoint "
            "contains the weights"
        )


def _beside(checkpoint: Path) -> Path:
    """Return the default output folder of a checkpoint: `export` in the folder of its run."""
    run = checkpoint.absolute().parent
    folder = (run.parent if run.name == "checkpoints" else run) / "export"
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _check_output(folder: Path, overwrite: bool) -> None:
    """Check that the output folder is new, empty, or an export that may be replaced.

    Raises:
        ValueError: If files would be lost.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / PREPROCESSING).is_file():
        raise ValueError(f"{folder} exists but is not an export of lkd; use a new folder as --output")
    if foreign := sorted(path.name for path in folder.iterdir() if not path.name.startswith(_OWN)):
        raise ValueError(
            f"{folder} contains {foreign[0]!r}, which is not part of an export; use a new folder as --output"
        )
    if not overwrite:
        raise ValueError(f"{folder} already contains an export; use another --output, or --overwrite to replace it")


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically, replacing an existing one.

    Args:
        folder: The folder.

    Yields:
        Temporary folder, which replaces `folder` on success and is removed after an exception.
    """
    folder = folder.resolve()  # keep symbolic links
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
    """Evaluate on all test images in float32, then move the module to the CPU and detach the trainer."""
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


def _with_progress(found: Iterable[Batch], total: int) -> Iterable[Batch]:
    """Show a progress bar while iterating over batches."""
    console = Console(stderr=True)
    return track(found, "comparing", total, transient=True, console=console, disable=not console.is_terminal)


def _check_tolerance(checked: Sequence[Checked]) -> None:
    """Check that the logits of all float32 files are within the tolerance.

    Raises:
        ValueError: If a file exceeds the tolerance.
    """
    for one in checked:
        if one.file != INT8_FILE and not one.difference <= TOLERANCE:
            raise ValueError(
                f"{one.file} does not reproduce the checkpoint: on {one.images} test images its logits differ by up to "
                f"{one.difference:.2g}, but at most {TOLERANCE:g} is allowed; nothing was exported; try another "
                "--format"
            )


def _print(done: Export) -> None:
    task = done.files[0].task
    title = task.metric_title
    table = Table("file", "bytes", "max. logit difference", "same prediction", title)
    for one in done.files:
        row = (f"{one.size:,}", f"{one.difference:.2g}", percent(one.agreement), one.task.formatted(one.score))
        table.add_row(one.file, *row)
    console = Console(soft_wrap=True)
    console.print(table)
    first, sizes = done.files[0], {one.file: one.size for one in done.files}
    expected = task.formatted(first.expected_score)
    lines = [f"Compared on {first.images:,} test images; {title} of the checkpoint: {expected}"]
    if INT8_FILE in sizes:
        change = task.formatted_difference(done.files[-1].score - first.expected_score)
        share = sizes[INT8_FILE] / sizes[WRITERS["onnx"][0]]
        lines.append(f"8-bit ONNX: {change} {title}, {share:.0%} of the size of float32 ONNX")
    for line in [*lines, f"Export:     {done.folder}", f"Model card: {done.folder / CARD}"]:
        console.print(line, highlight=False, markup=False)
