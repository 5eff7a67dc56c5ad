"""Measure whether lkd's optimizations cost accuracy: same images, same epochs, several seeds.

    python -m benchmarks.accuracy IMAGES TEACHER [--seeds 3] [--images 8000] [--epochs 6] [--out FILE]

IMAGES and TEACHER are those of benchmarks/speed.py. For each seed, ResNet-20 learns from ResNet-56 three times: in
float32 with all optimizations off, with the defaults of `lkd fit`, and with cached teacher logits for two variants of
each image. Every run is evaluated on all test images after the last step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.speed import machine

HEAD = (
    "# Accuracy with and without optimizations",
    "",
    "`python -m benchmarks.accuracy` measures whether lkd's optimizations reduce the accuracy of the student.",
    "ResNet-20 learns from ResNet-56 in float32 with all optimizations off, with the defaults of `lkd fit`, and with",
    "cached teacher logits for two variants of each image. Values are means over the seeds, after the last step.",
    "",
)
"""Title and introduction of the report."""

WAYS = {
    "float32, optimizations off": [
        "--trainer.precision=32-true",
        "--speed.channels_last=false",
        "--speed.fold_teacher=false",
        "--speed.compile=off",
        "--speed.keep_memory=false",
    ],
    "defaults": [],
    "defaults, cached logits, 2 variants": ["--teacher_cache.versions=2"],
}


def accuracy(way: list[str], seed: int, images: str, teacher: str, number: int, epochs: int) -> float:
    """Train once and return the test accuracy in percent."""
    from lkd.cli.arguments import prepare
    from lkd.cli.lightning_cli import LkdCLI

    settings = [
        "--config=cifar10/kd_resnet56_resnet20",
        f"--data.init_args.root={images}",
        f"--data.init_args.label_size={number}",
        "--data.init_args.drop_unlabelled=true",
        f"--model.init_args.teacher_ckpt={teacher}",
        f"--model.init_args.lr_scheduler.init_args.milestones=[{2 * epochs // 3 / epochs}, {5 * epochs // 6 / epochs}]",
        f"--seed_everything={seed}",
        f"--trainer.max_epochs={epochs}",
        "--trainer.limit_val_batches=0",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
    ]
    cli = LkdCLI(*prepare(["fit", *settings, *way]))
    (result,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return 100 * result["test/acc"]


def table(found: dict[str, list[float]]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    plain = next(iter(found.values()))
    yield "| | test accuracy, % | standard deviation | seeds | difference to float32, same seeds |"
    yield "|---|---|---|---|---|"
    for name, values in found.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        each = ", ".join(f"{value:.2f}" for value in values)
        gain = statistics.mean(ours - theirs for ours, theirs in zip(values, plain, strict=True))
        yield f"| {name} | {statistics.mean(values):.2f} | {spread} | {each} | {gain:+.2f} |"


def main() -> None:
    """Train, evaluate and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="images")
    parser.add_argument("teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    images, teacher = (str(Path(path).resolve()) for path in (options.folder, options.teacher))
    out = options.out and options.out.resolve()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LKD_CACHE"] = folder
        os.chdir(folder)
        for seed in range(options.seeds):
            for name, way in WAYS.items():
                found[name].append(accuracy(way, seed, images, teacher, options.images, options.epochs))
                print(f"{name}, seed {seed}: {found[name][-1]:.2f}", flush=True)
    what = f"{options.images:,} training images, {options.epochs} epochs, all test images"
    lines = [*HEAD, *table(found), "", f"CIFAR-10 (JPEG), {what}; {machine()}"]
    print("\n".join(lines))
    if out:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
