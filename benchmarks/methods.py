"""Compare the test accuracy of all methods on the same real images, networks and number of steps.

    python benchmarks/methods.py IMAGES TEACHER [--seeds 3] [--methods kd dkd ...] [--processes 2] [--out FILE]

IMAGES is a folder train/<class>/, test/<class>/ of CIFAR-10, and TEACHER a file with the weights of the teacher in
methods.yaml, the base config. Each overlay of configs/methods/ is applied to it with the code of the command line, with
the weights of its paper and the default layers. Schedules over epochs are shortened by the ratio of this run's epochs
to the 240 epochs of the literature. The student is evaluated after its last step on all test images, so nothing is
selected by accuracy. Methods for transformers and methods that do not train a classifier are excluded. Finished runs
are saved in FILE and not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
METHODS = HERE.parent / "configs" / "methods"
ALONE = "(student alone)"
LITERATURE = 240  # epochs of the CIFAR-100 benchmark, to which the schedules of the overlays refer
LEFT_OUT = {
    "backbone_kd": "does not train a classifier",
    "deit": "the student is a transformer",
    **dict.fromkeys(
        ("ema_teacher_imagenet", "nkd_imagenet", "rld_imagenet", "uskd_imagenet"),
        "weights for ImageNet; the overlay without this suffix has those for small images",
    ),
    **dict.fromkeys(
        (
            *("cirkd", "cirkd_channel", "cwd", "dsd", "ifvd", "maskd", "skds"),
            *(f"{name}_segmentation" for name in ("at", "dist", "dkd", "fitnet", "kd", "mgd")),
        ),
        "for segmentation; see benchmarks/results/plans/camvid.yaml",
    ),
    "patient": "KD with another augmentation, for thousands of epochs",
    "transfer_set": "KD on other images; see benchmarks/little.py",
    "unlabelled": "KD without labels; see benchmarks/little.py",
    "vitkd": "the networks are transformers",
}


def written(settings: dict[str, Any], path: Path) -> str:
    """Write settings to a file and return the option that names it."""
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


def overlay(method: str, epochs: int) -> dict[str, Any]:
    """Return the settings of a method with shortened schedules; for the student alone, distillation is off."""
    if method == ALONE:
        return {"model": {"init_args": {"distill_weight": 0.0, "hard_weight": 1.0}}}
    settings: dict[str, Any] = yaml.safe_load((METHODS / f"{method}.yaml").read_text())
    for callback in settings.get("trainer", {}).get("callbacks+", []):
        arguments = callback["init_args"]
        arguments["epochs"] = max(1, round(arguments["epochs"] * epochs / LITERATURE))
    return settings


def train(method: str, seed: int, images: str, teacher: str) -> dict[str, Any]:
    """Train one method with one seed.

    Returns:
        The test accuracy in percent, and the duration of the training in seconds, during which other runs may be
        active.
    """
    import torch

    from lkd.cli.arguments import prepare
    from lkd.cli.lightning_cli import LkdCLI

    torch.set_num_threads(1)  # small networks cannot use two cores, so two runs share them
    base = yaml.safe_load((HERE / "methods.yaml").read_text())
    base["model"]["init_args"]["teacher_ckpt"] = teacher
    base["data"]["init_args"]["root"] = images
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            written(base, Path(folder, "base.yaml")),
            written(overlay(method, base["trainer"]["max_epochs"]), Path(folder, "method.yaml")),
            f"--seed_everything={seed}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
        ]
        start = time.perf_counter()
        cli = LkdCLI(*prepare(["fit", *settings]))
        seconds = time.perf_counter() - start
        (result,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return {"accuracy": 100 * result["test/acc"], "seconds": seconds}


def _run(job: tuple[str, int, str, str]) -> dict[str, Any]:
    method, seed, images, teacher = job
    try:
        return {"method": method, "seed": seed, **train(method, seed, images, teacher)}
    except Exception:  # a failed method is reported in the table and must not stop the others
        return {"method": method, "seed": seed, "error": traceback.format_exc()}


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown, best method first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["method"], []).append(result)
    good = {method: runs for method, runs in found.items() if all("accuracy" in run for run in runs)}
    alone = {run["seed"]: run["accuracy"] for run in good.get(ALONE, [])}
    means = {method: statistics.mean(run["accuracy"] for run in runs) for method, runs in good.items()}
    yield "| method | test accuracy, % | standard deviation | n | difference to the student alone, same seeds |"
    yield "|---|---|---|---|---|"
    for method in sorted(means, key=lambda name: -means[name]):
        values = [run["accuracy"] for run in good[method]]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        gains = [run["accuracy"] - alone[run["seed"]] for run in good[method] if run["seed"] in alone]
        gain = f"{statistics.mean(gains):+.2f}" if gains else "-"
        yield f"| {method} | {means[method]:.2f} | {spread} | {len(values)} | {gain} |"
    for method in sorted(set(found) - set(good)):
        yield f"| {method} | failed | | | |"


def main() -> None:
    """Run what is missing in the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/methods.jsonl"))
    options = parser.parse_args()
    own = sorted(path.stem for path in METHODS.glob("*.yaml") if path.stem not in LEFT_OUT)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(result["method"], result["seed"]) for result in results if "accuracy" in result}
    results = [result for result in results if "accuracy" in result]
    images, teacher = (str(Path(path).resolve()) for path in (options.images, options.teacher))
    jobs = [
        (method, seed, images, teacher)
        for seed in range(options.seeds)
        for method in options.methods or [ALONE, *own]
        if (method, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=8) as pool:
        for result in pool.imap_unordered(_run, jobs):
            results.append(result)
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(result.get("error") or f"{result['method']} {result['seed']}: {result['accuracy']:.2f}", flush=True)
    print("\n".join(table(results)))
    _print_machine()


def _print_machine() -> None:
    import lightning
    import torch

    import lkd

    versions = f"lkd {lkd.__version__}, torch {torch.__version__}, lightning {lightning.__version__}"
    print(f"\n{versions}, Python {platform.python_version()}, {os.cpu_count()} {platform.machine()} cores")


if __name__ == "__main__":
    main()
