"""Measure images per second of lkd, of an optimized PyTorch loop with the same arithmetic, and of a plain loop.

    python -m benchmarks.speed IMAGES TEACHER [--rounds 5] [--steps 40] [--only WORD ...] [--out FILE]
    python -m benchmarks.speed IMAGES TEACHER --trainer mine.py:make

IMAGES is a folder train/<class>/, test/<class>/ of CIFAR-10, and TEACHER a file with the weights of a ResNet-56
(shortcut A). ResNet-20 learns from it with batch size 128. Each row trains in its own process. The processes take
turns, one at a time, and the result is the ratio to the first row within a round. `--trainer` adds another trainer: the
function is called with the decoded images (N, 3, 32, 32), the targets (N,), the teacher, the student and the batch
size, and returns a function that takes one step and returns the number of images.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pacing import Row, in_turn

HEAD = (
    "# Training speed on a CPU",
    "",
    "`python -m benchmarks.speed IMAGES TEACHER` compares the images per second of `lkd fit`, of an optimized PyTorch",
    "loop with the same arithmetic, and of plain loops. ResNet-20 learns from ResNet-56 on CIFAR-10 (JPEG), with",
    "batch size 128. The ratio is that of the images per second of a row to those of the first row: median and range",
    "over the rounds.",
    "",
)
"""Title and introduction of the report."""

KEPT = 12_800
"""Number of images of the runs with cached logits: a hundred steps fill the cache."""


def decoded(images: str, folder: str) -> str:
    """Save all decoded training images to one file, for the loops that do not use lkd's data modules."""
    from lkd import CIFAR10DataModule

    data = CIFAR10DataModule(images, val_size=0, num_workers=0)  # this process may not be allowed to start others
    data.setup("fit")
    dataset = data.datasets["train"]
    np.save(f"{folder}/images.npy", dataset.images(dataset.index * 0, dataset.index).numpy())
    np.save(f"{folder}/targets.npy", dataset.target.numpy())
    return f"{folder}/images.npy"


def lkd(images: str, teacher: str, *settings: str, kept: bool = False) -> dict[str, Any]:
    """Return the arguments of a row that runs `lkd fit`."""
    always = [
        "--config=cifar10/kd_resnet56_resnet20",
        f"--data.init_args.root={images}",
        f"--model.init_args.teacher_ckpt={teacher}",
        "--trainer.max_epochs=10000",
        "--trainer.check_val_every_n_epoch=10000",
        "--trainer.num_sanity_val_steps=0",
    ]
    few = [f"--data.init_args.label_size={KEPT}", "--data.init_args.drop_unlabelled=true", "--teacher_cache.versions=1"]
    return {"settings": [*always, *(few if kept else []), *settings]}


def rows(images: str, teacher: str, arrays: str) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """Yield name, loop, arguments and number of warm-up steps of each row; the first row is the reference."""
    plain = {"images": arrays, "teacher": teacher}
    for workers in (0, 2):
        yield f"plain loop, PIL transforms, {workers} workers", "bare_eager", {**plain, "workers": workers}, 5
    yield "plain LightningModule, PIL transforms, 2 workers", "plain_lightning", {**plain, "workers": 2}, 5
    for bf16, name in ((False, "32-true"), (True, "bf16-mixed")):
        precision = f"--trainer.precision={name}"
        yield f"optimized loop, {name}", "bare_lean", {**plain, "bf16": bf16, "kept": False}, 5
        yield f"lkd fit, {name}", "lkd_fit", lkd(images, teacher, precision), 5
        yield f"optimized loop, {name}, cached logits", "bare_lean", {**plain, "bf16": bf16, "kept": True}, 5
        fill = KEPT // 128
        yield f"lkd fit, {name}, cached logits", "lkd_fit", lkd(images, teacher, precision, kept=True), fill
    switches = {
        "channels first": ["--speed.channels_last=false"],
        "teacher not folded": ["--speed.fold_teacher=false"],
        "memory not reused": ["--speed.keep_memory=false"],
        "compiled": ["--speed.compile=default"],
        "images decoded in every epoch (2 workers)": [
            "--data.init_args.resident_limit=0",
            "--data.init_args.num_workers=2",
        ],
        "no TensorBoard, no progress bar": ["--trainer.logger=false", "--trainer.enable_progress_bar=false"],
    }
    yield "lkd fit, defaults", "lkd_fit", lkd(images, teacher), 5
    for name, settings in switches.items():
        yield f"lkd fit, {name}", "lkd_fit", lkd(images, teacher, *settings), 5


TINY = """
model:
  class_path: lkd.DistillModule
  init_args:
    student: {class_path: benchmarks.loops.tiny, init_args: {width: 32}}
    teacher: {class_path: benchmarks.loops.tiny, init_args: {width: 64}}
data:
  class_path: lkd.SyntheticDataModule
  init_args: {num_classes: 10, input_shape: [3, 8, 8], train_size: IMAGES, test_size: 100, val_size: 1000, augment: []}
trainer: {max_epochs: 10000, check_val_every_n_epoch: 10000}
"""


def tiny_rows(folder: str) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """Yield rows with networks so small that a step consists of overhead only."""
    Path(folder, "tiny.yaml").write_text(TINY.replace("IMAGES", "26600"))
    yield "tiny networks, bare loop", "bare_tiny", {}, 200
    yield "tiny networks, lkd fit", "lkd_fit", {"settings": [f"--config={folder}/tiny.yaml"]}, 200


def measured(
    wanted: list[tuple[str, str, dict[str, Any], int]], rounds: int, steps: int, say: Callable[[str], None] = print
) -> list[Row]:
    """Start the rows and time them in turn."""
    found: list[Row] = []
    try:
        for name, loop, arguments, warm_up in wanted:
            found.append(Row(name, f"benchmarks.loops:{loop}", arguments, warm_up))
            say(f"{name}: ready ({found[-1].first:.0f} images/s during warm-up)")
        in_turn(found, rounds, steps, say)
    finally:
        for row in found:
            row.close()
    return found


def table(found: list[Row]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| | ratio | range of the ratio | images/s | peak memory, MB |"
    yield "|---|---|---|---|---|"
    for row in found:
        ratios = [ours / theirs for ours, theirs in zip(row.speeds, found[0].speeds, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        speed, peak = f"{row.speed:,.0f}", f"{row.peak / 1e6:,.0f}"
        yield f"| {row.name} | {statistics.median(ratios):.2f} | {spread} | {speed} | {peak} |"


def overhead(bare: Row, ours: Row) -> str:
    """Report how many milliseconds `lkd fit` adds to a step of the bare loop."""
    above = [1e3 * 128 * (1 / one - 1 / other) for one, other in zip(ours.speeds, bare.speeds, strict=True)]
    return (
        f"With tiny networks (batch size 128), `lkd fit` with TensorBoard, metrics and progress bar adds "
        f"{statistics.median(above):.2f} ms ({min(above):.2f} to {max(above):.2f}) to a step of the bare loop, which "
        f"takes {1e3 * 128 / bare.speed:.2f} ms."
    )


def machine() -> str:
    """Describe the machine and the versions."""
    import lightning
    import torch

    import lkd as library

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    has = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()}
    units = " and ".join(unit for unit, there in has.items() if there) or "none"
    versions = f"lkd {library.__version__}, torch {torch.__version__}, lightning {lightning.__version__}"
    return (
        f"{name}, {torch.get_num_threads()} threads, bfloat16 units: {units}; "
        f"{versions}, Python {platform.python_version()}"
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="the first row, and rows whose name contains one of these words"
    )
    parser.add_argument("--trainer", help="another trainer to time: mine.py:make")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    images, teacher = (str(Path(path).resolve()) for path in (options.images, options.teacher))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LKD_CACHE"] = folder  # no cached files of an earlier run
        arrays = decoded(images, folder)
        first, *others = rows(images, teacher, arrays)
        wanted = [first, *(row for row in others if any(word in row[0] for word in options.only))]
        if options.trainer:
            arguments = {"adapter": str(Path(options.trainer).resolve()), "images": arrays, "teacher": teacher}
            wanted.append((options.trainer, "own", arguments, 5))
        found = measured(wanted, options.rounds, options.steps)
        kept = [row for row in found if row.name.startswith("lkd fit") and "cached logits" in row.name]
        lines = [*HEAD, *table(found), ""]
        lines += [f"{row.name}: the epoch that fills the cache runs at {row.first:,.0f} images/s." for row in kept]
        pair = [row for row in tiny_rows(folder) if any(word in row[0] for word in options.only)]
        if len(pair) == 2:
            lines += ["", overhead(*measured(pair, options.rounds, 50 * options.steps))]
        lines += ["", f"n = {options.rounds} rounds of {options.steps} steps; {machine()}"]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
