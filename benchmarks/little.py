"""Compare a student alone with a distilled student when labels or images are scarce: test accuracy.

    python -m benchmarks.little IMAGES TEACHER [--seeds 3] [--pool 5000] [--epochs 10] [--made 1024] [--made_steps 150]
        [--only WORD] [--folder runs/little] [--out FILE]

IMAGES is a folder train/<class>/, test/<class>/ of CIFAR-10, and TEACHER a file with the weights of the teacher in
little.yaml, the base config. Training uses a pool, the first images of each class. The rows are: a fraction of the
pool's labels; no labels; a transfer set of random crops of the two photographs included in scikit-learn; images
synthesized from the teacher (DeepInversion). All runs have the same number of steps (up to a fraction of an epoch) and
a schedule with the same final learning rate. A student alone uses only labelled images; the label of a synthesized
image is its target class. A distilled student uses all images, and the labels where available. Each seed changes
initialization, order, augmentation and the choice of labels; images are synthesized once. The student is evaluated
after its last step on all test images, so nothing is selected by accuracy.

Each finished run is saved as a line in FOLDER/runs.jsonl and not repeated: the same command continues an interrupted
one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from benchmarks.speed import machine

HERE = Path(__file__).parent
SIDE = 32
LEAST, MOST = 32, 256  # size of a crop of a photograph, in pixels
SHARES = {"1 %": 0.01, "10 %": 0.1, "100 %": 1.0}  # fractions of the labels


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: Name of the training data.
        data: Settings of the data module for the distilled student.
        images: Number of training images.
        alone: Settings of the data module for the student alone; `None` if there are no labels to learn from.
        labelled: Number of labelled training images.
        hard_weight: Weight of the cross-entropy with the labels for the distilled student.
    """

    name: str
    data: dict[str, Any]
    images: int
    alone: dict[str, Any] | None
    labelled: int
    hard_weight: float


def rows(pool: int, made: int, made_steps: int, photographs: str, teacher: str) -> list[Row]:
    """Return the rows of the table."""
    found = []
    for name, share in SHARES.items():
        part = {"label_size": share}
        number = round(share * pool)
        found.append(Row(f"{name} of the labels", part, pool, {**part, "drop_unlabelled": True}, number, 0.1))
    found.append(Row("no labels", {"label_size": 0}, pool, None, 0, 0.0))
    folder = {"class_path": "lkd.datamodules.UnlabelledFolder", "init_args": {"root": photographs}}
    only = {"label_size": 0, "drop_unlabelled": True}
    found.append(Row("other images: crops of two photographs", {**only, "extra": folder}, pool, None, 0, 0.0))
    model = yaml.safe_load((HERE / "little.yaml").read_text())["model"]["init_args"]
    network = {"network": model["teacher"], "path": teacher}
    inversion = {
        "network": {"class_path": "lkd.models.load_weights", "init_args": network},
        "number": made,
        "steps": made_steps,
        "normalization": model["teacher_normalization"],
    }
    own = {**only, "extra": {"class_path": "lkd.datamodules.DeepInversion", "init_args": inversion}}
    name = f"no images: {made:,} synthesized from the teacher, {made_steps:,} steps"
    found.append(Row(name, own, made, own, made, 0.0))
    return found


def settings(row: Row, alone: bool, seed: int, pool: int, epochs: int, images: str, teacher: str) -> dict[str, Any]:
    """Return the config of one run."""
    config: dict[str, Any] = yaml.safe_load((HERE / "little.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    number = row.labelled if alone else row.images
    size = min(data["batch_size"], number)
    per_epoch = number // size
    config["trainer"]["max_epochs"] = round(epochs * (pool // data["batch_size"] or 1) / per_epoch)
    for name in ("label_size", "drop_unlabelled"):
        del data[name]
    data |= {"root": images, "val_size": 0, "split_seed": seed, **((row.alone if alone else row.data) or {})}
    if alone:
        kept = {"optimizer": model["optimizer"], "lr_scheduler": model["lr_scheduler"]}
        config["model"] = {"class_path": "lkd.ClassificationModule", "init_args": {"model": model["student"], **kept}}
    else:
        model |= {"teacher_ckpt": teacher, "hard_weight": row.hard_weight, "distill_weight": 1 - row.hard_weight}
        config["teacher_cache"] = {"versions": 2}
    return config


def train(config: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Train once; return test accuracies in percent (student, and teacher if any), steps and seconds of training."""
    import torch

    from lkd.cli.arguments import prepare
    from lkd.cli.lightning_cli import LkdCLI

    torch.set_num_threads(1)  # small networks cannot use two cores
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={folder}"]
    start = time.perf_counter()
    cli = LkdCLI(*prepare(["fit", f"--config={path}", f"--seed_everything={seed}", *quiet]))
    seconds = time.perf_counter() - start
    steps = cli.trainer.global_step
    (result,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    found = {"accuracy": 100 * result["test/acc"], "steps": steps, "seconds": seconds}
    return found | ({"teacher": 100 * result["test/teacher_acc"]} if "test/teacher_acc" in result else {})


def pool_of(images: Path, number: int, folder: Path) -> str:
    """Create a folder of links to the first training images of each class and to all test images."""
    classes = sorted(path.name for path in (images / "train").iterdir())
    for name in classes:
        own = folder / "train" / name
        own.mkdir(parents=True, exist_ok=True)
        for path in sorted((images / "train" / name).iterdir())[: number // len(classes)]:
            if not (own / path.name).exists():
                (own / path.name).symlink_to(path)
    if not (folder / "test").exists():
        (folder / "test").symlink_to(images / "test")
    return str(folder)


def parts_of_photographs(number: int, folder: Path) -> str:
    """Create a folder of random square crops of scikit-learn's two photographs, 32x32 pixels, as PNG files."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number):
        photograph = photographs[place % len(photographs)]
        side = round(LEAST * (MOST / LEAST) ** draw.random())
        left, top = (int(draw.integers(size - side + 1)) for size in photograph.size)
        part = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        part.save(folder / f"{place:05}.png")
    return str(folder)


def table(lines: list[Row], results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| training data | student alone, % | distilled student, % | difference, same seeds | n |"
    yield "|---|---|---|---|---|"
    for row in lines:
        alone, distilled = (_by_seed(results, row.name, way) for way in (True, False))
        both = sorted(alone.keys() & distilled.keys())
        gain = f"{statistics.mean(distilled[seed] - alone[seed] for seed in both):+.2f}" if both else "-"
        yield f"| {row.name} | {_cell(alone)} | {_cell(distilled)} | {gain} | {len(distilled)} |"


def _by_seed(results: list[dict[str, Any]], name: str, alone: bool) -> dict[int, float]:
    return {run["seed"]: run["accuracy"] for run in results if (run["row"], run["alone"]) == (name, alone)}


def _cell(found: dict[int, float]) -> str:
    if not found:
        return "-"
    spread = f" ± {statistics.stdev(found.values()):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found.values()):.2f}{spread}"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("teacher", type=Path)
    for name, number in (("seeds", 3), ("pool", 5000), ("epochs", 10), ("made", 1024), ("made_steps", 150)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", default="", help="run only rows whose name contains this word")
    parser.add_argument("--folder", type=Path, default=Path("runs/little"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder, teacher = options.folder.resolve(), str(options.teacher.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LKD_CACHE"] = str(folder / "cache")
    images = pool_of(options.images.resolve(), options.pool, folder / "images")
    photographs = parts_of_photographs(options.pool, folder / "photographs")
    lines = rows(options.pool, options.made, options.made_steps, photographs, teacher)
    file = folder / "runs.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(run["row"], run["alone"], run["seed"]) for run in results}
    wanted = [row for row in lines if options.only in row.name]
    jobs = [(row, alone, seed) for seed in range(options.seeds) for row in wanted for alone in (True, False)]
    for row, alone, seed in jobs:
        if (row.name, alone, seed) in done or (alone and row.alone is None):
            continue
        config = settings(row, alone, seed, options.pool, options.epochs, images, teacher)
        run = {"row": row.name, "alone": alone, "seed": seed, **train(config, seed, folder)}
        results.append(run)
        with file.open("a") as opened:
            opened.write(json.dumps(run) + "\n")
        print(json.dumps(run), flush=True)
    known = " or ".join(sorted({f"{run['teacher']:.2f}" for run in results if "teacher" in run}))
    steps = sorted({run["steps"] for run in results})
    what = f"a pool of {options.pool:,} images, {steps[0]:,} to {steps[-1]:,} steps; accuracy of the teacher: {known} %"
    text = "\n".join([*table(lines, results), "", f"CIFAR-10 (JPEG), {what}; {machine()}"])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
