"""Measure how the cost of a step scales with batch size, teacher, number of classes and number of images.

    python -m benchmarks.growth [--rounds 3] [--steps 20] [--only WORD ...] [--out FILE]

For each setting, three runs of `lkd fit` on synthetic images (3x32x32) take turns: ResNet-20 trained with labels only,
distilled with cached teacher logits, and distilled with the teacher run in every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.pacing import Row, in_turn
from benchmarks.speed import TINY, machine

HEAD = (
    "# Growth of the cost of a step",
    "",
    "`python -m benchmarks.growth` measures how the cost of a step grows with the batch size, the teacher, the number",
    "of classes and the number of images. ResNet-20 is trained on synthetic images with labels only, distilled with",
    "cached teacher logits, and distilled with the teacher run in every step (uncached). The first two columns",
    "contain the median ratio of images per second, and its range over the rounds.",
    "",
)
"""Title and introduction of the report."""


class Setting(NamedTuple):
    """Setting of one line of the table."""

    batch_size: int = 128
    teacher: str = "resnet56"
    classes: int = 100
    images: int = 5_120

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.teacher}, {self.classes:,} classes, {self.images:,} images"


SETTINGS = [
    Setting(),
    *(Setting(batch_size=size) for size in (16, 32, 512)),
    *(Setting(teacher=name) for name in ("resnet20", "resnet110", "resnet32x4")),
    *(Setting(classes=number) for number in (10, 1_000, 21_841)),
    *(Setting(images=number) for number in (51_200, 204_800)),
]


def config(setting: Setting, way: str) -> dict[str, Any]:
    """Return the config of a run; `way` is `labels`, `cached` or `uncached`."""
    student = {"class_path": "lkd.models.resnet20", "init_args": {"num_classes": setting.classes}}
    teacher = {"class_path": f"lkd.models.{setting.teacher}", "init_args": {"num_classes": setting.classes}}
    module = (
        {"class_path": "lkd.ClassificationModule", "init_args": {"model": student}}
        if way == "labels"
        else {"class_path": "lkd.DistillModule", "init_args": {"student": student, "teacher": teacher}}
    )
    data = {
        **{"num_classes": setting.classes, "input_shape": [3, 32, 32], "batch_size": setting.batch_size},
        **{"train_size": setting.images, "test_size": setting.classes, "val_size": 0},
    }
    augment = [{"class_path": f"lkd.datamodules.{name}"} for name in ("RandomCrop", "RandomHorizontalFlip")]
    return {
        "model": module,
        "data": {"class_path": "lkd.SyntheticDataModule", "init_args": {**data, "augment": augment}},
        "trainer": {"max_epochs": 100_000},
        "checkpoint": {"monitor": None},
        # bfloat16: the logits of a deep, untrained teacher exceed the range of float16.
        **({"teacher_cache": {"versions": 1, "dtype": "bfloat16"}} if way == "cached" else {}),
    }


def measured(setting: Setting, rounds: int, steps: int, folder: str) -> list[Row]:
    """Time the three runs of a setting."""
    found: list[Row] = []
    try:
        for way in ("labels", "cached", "uncached"):
            path = Path(folder, f"{way}.yaml")
            path.write_text(yaml.safe_dump(config(setting, way)))
            fill = setting.images // setting.batch_size if way == "cached" else 5
            found.append(Row(way, "benchmarks.loops:lkd_fit", {"settings": [f"--config={path}"]}, fill))
        in_turn(found, rounds, steps, lambda line: None)
    finally:
        for row in found:
            row.close()
    return found


def line(setting: Setting, found: list[Row]) -> str:
    """Return a line of the table, in Markdown."""
    labels, cached, uncached = found
    ratios = [
        [ours / theirs for ours, theirs in zip(row.speeds, labels.speeds, strict=True)] for row in (cached, uncached)
    ]
    texts = [f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in ratios]
    speeds = " | ".join(f"{row.speed:,.0f}" for row in found)
    return f"| {setting} | {' | '.join(texts)} | {speeds} | {cached.peak / 1e6:,.0f} | {cached.start_up:.1f} |"


def table(settings: list[Setting], rounds: int, steps: int) -> Iterator[str]:
    """Measure the settings and yield the lines of the table."""
    yield (
        "| | cached / labels only | uncached / labels only | images/s, labels only | images/s, cached "
        "| images/s, uncached | peak memory, MB, cached | start-up, s, cached |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LKD_CACHE"] = folder  # no cached files of an earlier run
        for setting in settings:
            yield line(setting, measured(setting, rounds, steps, folder))


def long_run(folder: str, few: int, many: int) -> str:
    """Report the peak memory after few and after many epochs (2 steps; validation, checkpoints, cached logits)."""
    path = Path(folder, "tiny.yaml")
    path.write_text(TINY.replace("IMAGES", "1256"))
    settings = [f"--config={path}", "--trainer.check_val_every_n_epoch=1", "--teacher_cache.versions=4"]
    row = Row("long", "benchmarks.loops:lkd_fit", {"settings": settings}, 1)
    try:
        row.run(2 * few - 2)
        early = row.peak
        row.run(2 * (many - few))
    finally:
        row.close()
    return (
        f"Peak memory of a run with tiny networks after {few} epochs: {early / 1e6:,.0f} MB; after {many:,} epochs: "
        f"{row.peak / 1e6:,.0f} MB."
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[""], help="settings whose name contains one of these words")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wanted = [setting for setting in SETTINGS if any(word in str(setting) for word in options.only)]
    lines = list(HEAD)
    for text in table(wanted, options.rounds, options.steps):
        print(text, flush=True)
        lines.append(text)
    if "epochs" in options.only or "" in options.only:
        with tempfile.TemporaryDirectory() as folder:
            lines += ["", long_run(folder, 20, 1000)]
    lines += ["", f"n = {options.rounds} rounds of {options.steps} steps; {machine()}"]
    print("\n".join(lines[-3:]))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
