"""Compare the test accuracy of teacher, student alone and distilled student on the digits.

    python benchmarks/digits.py [--seeds 5] [--labels 100]

Each row trains a config of configs/digits/ with the code of the command line, once per seed. A distilled student learns
from the teacher with the same seed, which is trained with all labels. With few labels, the student alone is trained on
the labelled images for the same number of steps; the distilled student also uses the other images, without their
labels. Checkpoints are selected by accuracy on the 288 validation images, and the 359 test images are used once.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile

import lightning as L
import torch

import lkd
from lkd.cli.lightning_cli import LkdCLI


def fit(config: str, seed: int, folder: str, *settings: str) -> tuple[float, str]:
    """Train one config and return its test accuracy in percent and its best checkpoint."""
    args = ["fit", "--config", f"configs/digits/{config}.yaml", f"--seed_everything={seed}", *settings]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    cli = LkdCLI([*args, *quiet], f"{config}{seed}")
    best = cli.trainer.checkpoint_callback.best_model_path
    (result,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)
    return 100 * result["test/acc"], best


def few_labels(number: int) -> tuple[str, list[str], list[str]]:
    """Return a label and the settings of both students, which train for the same number of steps."""
    labels = f"--data.init_args.label_size={number}"
    steps, batch_size = 17, 64  # per epoch in configs/digits/
    per_epoch = max(number // batch_size, 1)
    epochs = 30 * steps // per_epoch
    longer = f"--trainer.max_epochs={epochs}"
    rarely = f"--trainer.check_val_every_n_epoch={steps // per_epoch}"
    return str(number), [labels, "--data.init_args.drop_unlabelled=true", longer, rarely], [labels]


def main() -> None:
    """Train all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=100)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            accuracy, teacher = fit("teacher", seed, folder)
            rows.setdefault("teacher", []).append(accuracy)
            for amount, alone, distilled in (("all", [], []), few_labels(options.labels)):
                rows.setdefault(f"student alone, {amount} labels", []).append(fit("student", seed, folder, *alone)[0])
                distilled = [*distilled, f"--model.init_args.teacher_ckpt={teacher}"]
                rows.setdefault(f"distilled student, {amount} labels", []).append(
                    fit("kd", seed, folder, *distilled)[0]
                )
    print(f"\n| test accuracy, % | mean | standard deviation | seeds 0 to {options.seeds - 1} |\n|---|---|---|---|")
    for name, values in rows.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {statistics.mean(values):.2f} | {spread:.2f} | {each} |")
    versions = f"lkd {lkd.__version__}, torch {torch.__version__}, lightning {L.__version__}"
    print(f"\n{versions}, Python {platform.python_version()}, {os.cpu_count()} {platform.machine()} cores")


if __name__ == "__main__":
    main()
