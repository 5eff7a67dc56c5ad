"""Compare the test accuracy of teacher, student alone and distilled student on the examples.

    cd examples && python table.py text|audio [--seeds 5]

The three configs of an example are trained with the code of the command line, once per seed. The distilled student
learns from the teacher with the same seed. The best checkpoint is selected on the validation samples, and the test
samples are used once.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time

import lightning as L
import torch

import lkd
from lkd.cli.lightning_cli import LkdCLI


def fit(config: str, seed: int, folder: str, *settings: str) -> tuple[float, str]:
    """Train one config and return its test accuracy in percent and its best checkpoint."""
    args = ["fit", f"--config={config}.yaml", f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
    cli = LkdCLI([*args, "--trainer.enable_progress_bar=false", *settings], f"{config}{seed}")
    best = cli.trainer.checkpoint_callback.best_model_path
    (result,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)
    return 100 * result["test/acc"], best


def main() -> None:
    """Train all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", choices=["text", "audio"])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {"teacher": [], "student alone": [], "distilled student": []}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            accuracy, teacher = fit(f"{options.example}_teacher", seed, folder)
            rows["teacher"].append(accuracy)
            rows["student alone"].append(fit(f"{options.example}_student", seed, folder)[0])
            taught = f"--model.init_args.teacher_ckpt={teacher}"
            rows["distilled student"].append(fit(options.example, seed, folder, taught)[0])
    took = (time.monotonic() - began) / options.seeds
    print(f"\n| test accuracy, % | mean | standard deviation | seeds 0 to {options.seeds - 1} |\n|---|---|---|---|")
    for name, values in rows.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {statistics.mean(values):.2f} | {spread:.2f} | {each} |")
    versions = f"lkd {lkd.__version__}, torch {torch.__version__}, lightning {L.__version__}"
    threads = f"{torch.get_num_threads()} threads, {took:.0f} s per seed"
    print(f"\n{versions}, Python {platform.python_version()}, {threads}")


if __name__ == "__main__":
    main()
