"""Does distillation help on the digits? Test accuracy of teacher, student alone and distilled student.

    python benchmarks/digits.py [--seeds 5]

Every row trains `configs/digits/*.yaml` through the command line's own code once per seed; the distilled student
learns from the teacher of the same seed. The checkpoint is chosen by validation accuracy, the test split is used once.
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
from lkd.cli import LkdCLI


def fit(config: str, seed: int, folder: str, *settings: str) -> tuple[float, str]:
    """Train one config; its test accuracy in percent, and the checkpoint."""
    args = ["fit", "--config", f"configs/digits/{config}.yaml", f"--seed_everything={seed}", *settings]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    cli = LkdCLI([*args, *quiet], f"{config}{seed}")
    best = cli.trainer.checkpoint_callback.best_model_path
    (result,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)
    return 100 * result["test/acc"], best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    rows: dict[str, list[float]] = {"teacher": [], "student alone": [], "distilled student": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            teacher, best = fit("teacher", seed, folder)
            rows["teacher"].append(teacher)
            rows["student alone"].append(fit("student", seed, folder)[0])
            rows["distilled student"].append(fit("kd", seed, folder, f"--model.init_args.teacher_ckpt={best}")[0])
    print(f"\n| test accuracy, % | mean | standard deviation | each of seeds {seeds.start}-{seeds.stop - 1} |\n|---|---|---|---|")
    for name, values in rows.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} | {each} |")
    print(
        f"\nlkd {lkd.__version__}, torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores of {platform.machine()}, no GPU used: {not torch.cuda.is_available()}"
    )


if __name__ == "__main__":
    main()
