"""Compare detectors on generated shapes: a student alone, PKD, and KD with LD. Mean average precision on test images.

    python -m benchmarks.detection [--seeds 3] [--folder runs/detection_benchmark] [--teacher FILE] [--out FILE]

Each run trains a config of configs/detection/ with the code of the command line. One teacher, trained with seed 0 or
read from FILE, serves all seeds. Checkpoints are selected by mean AP on the validation images, and the test images are
used once.

Each finished run is saved as a line in FOLDER/runs.jsonl and not repeated: the same command continues an interrupted
one. The table is written after each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import machine
from lkd.cli.lightning_cli import LkdCLI

CONFIGS = {"student": "student alone", "pkd": "PKD", "kd_ld": "KD + LD"}
_PERCENT = 100


def fit(config: str, seed: int, folder: Path, *settings: str) -> dict[str, Any]:
    """Train one config, and evaluate its best checkpoint on the test images."""
    start = time.perf_counter()
    args = ["fit", "--config", f"configs/detection/{config}.yaml", f"--seed_everything={seed}", *settings]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    cli = LkdCLI([*args, *quiet], f"{config}{seed}")
    best: str = cli.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    (result,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)
    minutes = (time.perf_counter() - start) / 60
    return {
        "config": config,
        "seed": seed,
        "best": best,
        "minutes": minutes,
        "epochs": cli.trainer.max_epochs,
        **result,
    }


def table(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Return the lines of the table: mean and standard deviation over the seeds."""
    yield "| training | mean AP, % | AP at IoU 0.5, % | difference to the student alone, same seeds | n | minutes |"
    yield "|---|---|---|---|---|---|"
    alone = {run["seed"]: run["test/map"] for run in runs if run["config"] == "student"}
    teachers = {run["test/teacher_map"]: run["test/teacher_map_50"] for run in runs if "test/teacher_map" in run}
    for first, second in teachers.items():
        yield f"| teacher | {_PERCENT * first:.2f} | {_PERCENT * second:.2f} | - | 1 | - |"
    for config, name in CONFIGS.items():
        own = [run for run in runs if run["config"] == config]
        gains = [run["test/map"] - alone[run["seed"]] for run in own if config != "student" and run["seed"] in alone]
        if own:
            scores = (_spread([run[f"test/{metric}"] for run in own]) for metric in ("map", "map_50"))
            minutes = statistics.mean(run["minutes"] for run in own)
            yield f"| {name} | {' | '.join(scores)} | {_spread(gains, '+')} | {len(own)} | {minutes:.1f} |"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean and standard deviation in percent."""
    if not values:
        return "-"
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    return f"{_PERCENT * mean:{sign}.2f}" + ("" if deviation is None else f" ± {_PERCENT * deviation:.2f}")


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/detection_benchmark"))
    parser.add_argument("--teacher", help="checkpoint of the teacher; trained if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("rest", nargs="*", help="settings of all runs, such as --trainer.max_epochs=1, after `--`")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "runs.jsonl"
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def run(config: str, seed: int, *settings: str) -> dict[str, Any]:
        found = [one for one in runs if (one["config"], one["seed"]) == (config, seed)]
        if not found:
            found = [fit(config, seed, options.folder, *settings, *options.rest)]
            runs.extend(found)
            with log.open("a") as file:
                file.write(json.dumps(found[0]) + "\n")
        return found[0]

    teacher = options.teacher or run("teacher", 0)["best"]
    for seed in range(options.seeds):
        for config in CONFIGS:
            run(config, seed, *([] if config == "student" else [f"--model.init_args.teacher_ckpt={teacher}"]))
        text = "\n".join([*table(runs), "", machine()])
        print(text)
        if options.out is not None:
            options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
