"""Fault injection: kill runs, corrupt their files, fill their disk, and check that they resume exactly.

    python -m benchmarks.faults [--kills 50] [--seed 0] [--only WORD ...] [--out FILE]

Each row is a run of `lkd fit --resume` on the digits, with settings that have additional state. The run is restarted
until it completes. Its weights, optimizer, schedules, best checkpoint and curves are then compared bit by bit with
those of an uninterrupted run. The uninterrupted run of each row's settings is made twice and compared as well.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from PIL import Image

import lkd
from benchmarks.lives import Life, differences, live, live_in_group, timed, until_done

_FIT = ["fit", "--resume", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]
_FIT += ["--trainer.log_every_n_steps=7", "--last_checkpoint.every_n_train_steps=5"]
ARGS = [*_FIT, "--config", "digits/kd"]
_EMA = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"
_PLATEAU = "{class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: val/loss, patience: 0}}"
_MIXUP = "{class_path: lkd.datamodules.Mixup, init_args: {alpha: 0.2}}"
_ALL = ", ".join(f"lkd.datamodules.{name}" for name in ("RandomCrop", "RandAugment", "RandomErasing"))
_CROP = "[lkd.datamodules.RandomResizedCrop]"
_FOLDER = ["--data=lkd.ImageFolderDataModule", "--data.init_args.root=images", "--data.init_args.image_size=8"]
_FOLDER += ["--data.init_args.batch_size=16", "--trainer.check_val_every_n_epoch=2"]
_FOLDER += [f"--model.init_args.{name}.init_args.in_channels=3" for name in ("student", "teacher")]
_FOLDER += ["--model.init_args.teacher_ckpt=null"]
_SCENES = ["--config", "shapes/kd", "--model.init_args.teacher_ckpt=null", "--data=lkd.SegmentationFolderDataModule"]
_SCENES += [f"--data.init_args.{part}" for part in ("root=scenes", "num_classes=5", "image_size=[16,16]")]
_SCENES += [f"--data.init_args.{part}" for part in ("batch_size=8", "val_size=16", "num_workers=2")]
_BOXES = ["--config", "detection/kd_ld", "--model.init_args.teacher_ckpt=null"]
_BOXES += [f"--data.init_args.{part}" for part in ("train_size=60", "batch_size=4", "val_size=8")]

SETTINGS = {
    "digits": [],
    "augmentation, Mixup": [f"--data.init_args.augment=[{_ALL}]", f"--data.init_args.mix={_MIXUP}"],
    "image files, decoded once": _FOLDER,
    "image files, read by 2 workers": [*_FOLDER, "--data.init_args.num_workers=2", f"--data.init_args.augment={_CROP}"],
    "cached teacher logits": ["--teacher_cache.versions=2"],
    "memory bank (CRD)": ["--config", "methods/crd", "--model.init_args.criterion.init_args.num_negatives=512"],
    "random masks (MGD)": ["--config", "methods/mgd"],
    "weight averaging (EMA)": [f"--trainer.callbacks=[{_EMA}]"],
    "gradient accumulation, 3 batches": ["--trainer.accumulate_grad_batches=3"],
    "ReduceLROnPlateau": [f"--model.init_args.lr_scheduler={_PLATEAU}"],
    "past student as teacher (PS-KD)": ["--config", "methods/pskd"],
    "two momentum buffers (DOT)": ["--config", "methods/dot"],
    "validation twice per epoch": ["--trainer.val_check_interval=0.5"],
    "two views (MLKD)": ["--config", "methods/mlkd"],
    "two processes": ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"],
}
RUNS = {name: [*ARGS, *settings] for name, settings in SETTINGS.items()}
RUNS |= {"segmentation, files read by 2 workers": [*_FIT, *_SCENES], "detection": [*_FIT, *_BOXES]}
"""Arguments of each run by its name."""


class Row(NamedTuple):
    """A row of the table."""

    what: str
    settings: str
    times: int
    lives: int
    outcome: str
    differs: list[str]


def images(folder: Path) -> None:
    """Write image files of two classes, and images of different sizes with masks of five classes."""
    generator = np.random.default_rng(0)
    for number in range(160):
        split = "train" if number < 120 else "test"
        _write(folder / f"images/{split}/{number % 2}/{number}.png", generator.integers(0, 256, (12, 12)))
    for number in range(80):
        height, width = generator.integers(16, 25, 2)
        _write(folder / f"scenes/train/images/{number}.png", generator.integers(0, 256, (height, width, 3)))
        _write(folder / f"scenes/train/masks/{number}.png", generator.integers(0, 5, (height, width)))


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def run_of(folder: Path) -> Path:
    """Find the newest run in a folder; a life killed before its first checkpoint leaves a run without one."""
    (newest,) = sorted(folder.glob("runs/**/version_*"), key=lambda path: int(path.name.partition("_")[2]))[-1:]
    return newest


class Bench:
    """Create the rows of the table.

    Args:
        root: Working directory.
        seed: Random seed of the moments at which runs are killed.
        twice: Whether to make each uninterrupted run twice and compare the two.
    """

    def __init__(self, root: Path, seed: int = 0, twice: bool = True) -> None:
        self.root, self.random, self.twice = root, random.Random(seed), twice
        root.chmod(0o755)
        self._wholes: dict[str, tuple[Path, float]] = {}
        self._count = 0
        live(["--version"], self._new())  # starts the fork server, which imports the modules once

    def _new(self) -> Path:
        self._count += 1
        folder = self.root / str(self._count)
        folder.mkdir()
        images(folder)
        return folder

    def whole(self, settings: str) -> tuple[Path, float]:
        """Return an uninterrupted run with these settings and its duration in seconds."""
        if settings not in self._wholes:
            runs = []
            for _ in range(1 + self.twice):
                folder = self._new()
                life, seconds = timed(RUNS[settings], folder, settings == "two processes")
                if life.code != 0:
                    raise RuntimeError(f"{settings}: the uninterrupted run failed:\n{life.text}")
                runs.append((run_of(folder), seconds))
            if differs := differences(runs[0][0], runs[-1][0]):
                raise RuntimeError(f"{settings}: two uninterrupted runs differ: {differs}")
            self._wholes[settings] = runs[-1]
        return self._wholes[settings]

    def killed(self, settings: str) -> Row:
        """Kill a run at random moments until it completes."""
        whole, seconds = self.whole(settings)
        folder, args = self._new(), RUNS[settings]
        group = settings == "two processes"
        start = 0.5 * seconds if group else 0.0  # starting the interpreters is not part of the run
        moments: list[float] = []

        def one() -> Life:
            patience = 1.1 + 0.1 * len(moments)  # under other load, a process may take longer than the first one
            moments.append(start + self.random.uniform(0, patience) * (seconds - start))
            return (live_in_group if group else live)(args, folder, moments[-1])

        lives = until_done(one)
        return self._row("SIGKILL at a random moment", settings, len(lives) - 1, lives, folder, whole)

    def failed(
        self, what: str, fault: str, settings: str = "digits", wanted: str = "", resume: Sequence[str] = ()
    ) -> Row:
        """Inject a fault into the first life of a run, and resume the run, with other arguments if they are given."""
        whole, _ = self.whole(settings)
        folder, args = self._new(), RUNS[settings]
        first = live(args, folder, fault=fault)
        if first.code == 0:
            raise RuntimeError(f"{what}: the run did not fail:\n{first.text}")
        _expect(first, wanted)
        (folder / "runs").chmod(0o755)
        lives = [first, *until_done(partial(live, resume or args, folder))]
        return self._row(what, settings, 1, lives, folder, whole)

    def signalled(self, what: str, number: int, code: int, be: str = "anyone") -> Row:
        """Send a signal to a run at a random step, and resume the run."""
        whole, _ = self.whole("digits")
        folder = self._new()
        first = live(ARGS, folder, fault=f"benchmarks.faults:told_at,{self.random.randrange(1, 50)},{number},{be}")
        if first.code != code:
            raise RuntimeError(f"{what}: exit code {first.code} instead of {code}:\n{first.text}")
        _expect(first, "resume with: lkd fit --ckpt_path")
        if be == "slurm" and (folder / "requeued.txt").read_text() != "requeue 17\n":
            raise RuntimeError(f"{what}: the job was not requeued")
        lives = [first, *until_done(partial(live, ARGS, folder))]
        return self._row(what, "digits", 1, lives, folder, whole)

    def corrupted(self, what: str, damage: Callable[[Path], None]) -> Row:
        """Kill a run, corrupt its newest checkpoint, and resume the run."""
        whole, _ = self.whole("digits")
        folder = self._new()
        first = live(ARGS, folder, fault="benchmarks.faults:die_at_save,4,after")
        damage(run_of(folder) / "checkpoints/last.ckpt")
        second = live(ARGS, folder)
        _expect(second, "is corrupt")
        _expect(second, "previous.ckpt")
        lives = [first, second, *until_done(partial(live, ARGS, folder))]
        return self._row(what, "digits", 1, lives, folder, whole)

    def full(self) -> Row:
        """Fill the disk of a run, then free space and resume the run."""
        whole, _ = self.whole("digits")
        folder = self._new()
        disk = folder / "runs"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=True)
        try:
            first = live(ARGS, folder)
            _expect(first, "No space left on device")
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            lives = [first, *until_done(partial(live, ARGS, folder))]
            return self._row("full disk", "digits", 1, lives, folder, whole)
        finally:
            subprocess.run(["umount", disk], check=True)

    def _row(self, what: str, settings: str, times: int, lives: list[Life], folder: Path, whole: Path) -> Row:
        last = [line for line in lives[0].text.splitlines() if line.startswith("lkd: error: ")]
        outcome = last[0].removeprefix("lkd: error: ").replace(f"{folder}/", "") if last else ""
        row = Row(what, settings, times, len(lives), outcome, differences(run_of(folder), whole))
        shutil.rmtree(folder, ignore_errors=True)
        return row


def _expect(life: Life, text: str) -> None:
    if text not in " ".join(life.text.split()):
        raise RuntimeError(f"expected {text!r} in the output of lkd, got:\n{life.text}")


# Faults. They are called in the process that should fail, before the command.


def die_at_save(number: str, where: str) -> None:
    """Kill the process while or after it writes its n-th checkpoint.

    Args:
        number: Number n of the checkpoint, from 1.
        where: `half` (the file is half written), `unnamed` (before the file is renamed), or `after`.
    """
    import lkd.checkpoints.io as own

    left, save, replacing = [int(number)], torch.save, own.replacing

    def dying(checkpoint: Any, file: Any) -> None:
        save(checkpoint, file)
        if left[0] == 1 and where != "after":
            file.flush()
            if where == "half":
                os.truncate(file.fileno(), file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    class Replacing:
        def __init__(self, path: Path) -> None:
            self.context = replacing(path)

        def __enter__(self) -> Path:
            return self.context.__enter__()

        def __exit__(self, *error: Any) -> Any:
            done = self.context.__exit__(*error)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

    torch.save, own.replacing = dying, Replacing  # type: ignore[assignment]


def die_at_link() -> None:
    """Kill the process between the removal of the old hard link to the last checkpoint and the new link."""
    import lkd.callbacks.checkpoint as own

    def dying(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    own.os.link = dying


def small_files(size: str) -> None:
    """Limit the file size in bytes; exceeding it raises an error like that of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def nobody() -> None:
    """Switch to a user without write permission; permissions do not apply to root."""
    Path("runs").mkdir()
    Path("runs").chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


def told_at(step: str, number: str, be: str) -> None:
    """Send a signal to this process before a step.

    Args:
        step: Number of the step, from 1.
        number: Number of the signal.
        be: `slurm` to emulate a SLURM job.
    """
    from lkd.callbacks import StepSeed

    if be == "slurm":
        slurm()
    left, seed = [int(step)], StepSeed.on_train_batch_start

    def told(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), int(number))
        seed(*args)

    StepSeed.on_train_batch_start = told  # type: ignore[method-assign]


def slurm() -> None:
    """Emulate a SLURM job, with a `scontrol` that only records its arguments."""
    Path("bin").mkdir()
    Path("bin/scontrol").write_text('#!/bin/sh\necho "$@" > requeued.txt\n')
    Path("bin/scontrol").chmod(0o755)
    os.environ["PATH"] = f"{Path('bin').resolve()}:{os.environ['PATH']}"
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "lkd", "SLURM_PROCID": "0"}
    os.environ.update({**job, "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})


def cut(path: Path) -> None:
    """Truncate a file to half its size."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def blank(path: Path) -> None:
    """Overwrite a file with zeros, as some file systems do after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    """Truncate a file to zero bytes."""
    path.write_bytes(b"")


def faults(bench: Bench) -> list[Callable[[], Row]]:
    """Return all faults except kills at random moments."""
    at = "benchmarks.faults:die_at_save"
    rows: list[Callable[[], Row]] = []
    for number in (1, 2, 4):
        rows.append(partial(bench.failed, f"SIGKILL while checkpoint {number} is written", f"{at},{number},half"))
        rows.append(partial(bench.failed, f"SIGKILL before checkpoint {number} is renamed", f"{at},{number},unnamed"))
        rows.append(partial(bench.failed, f"SIGKILL right after checkpoint {number}", f"{at},{number},after"))
    rows.append(partial(bench.failed, "SIGKILL between removing and creating a link", "benchmarks.faults:die_at_link"))
    for damage in (cut, flip, blank, empty):
        what = f"corrupt last.ckpt: {str(damage.__doc__).splitlines()[0].rstrip('.').lower()}"
        rows.append(partial(bench.corrupted, what, damage))
    refused = "cannot be written"
    rows.append(partial(bench.failed, "file size limit", "benchmarks.faults:small_files,60000", wanted=refused))
    rows.append(
        partial(bench.failed, "folder without write permission", "benchmarks.faults:nobody", wanted="ermission")
    )
    rows.append(partial(bench.signalled, "SIGTERM", int(signal.SIGTERM), 143))
    rows.append(partial(bench.signalled, "Ctrl-C", int(signal.SIGINT), 1))
    rows.append(partial(bench.signalled, "SLURM's signal", int(signal.SIGUSR1), 143, "slurm"))
    return rows


def _may_mount() -> bool:
    """Return whether this user may mount a small disk."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def table(rows: Sequence[Row], seed: int) -> str:
    """Format the rows in Markdown, with the versions."""
    kills = sum(row.times for row in rows if "random moment" in row.what)
    lost = [row for row in rows if row.differs]
    lines = [
        "# Interrupted runs",
        "",
        f"Generated by `python -m benchmarks.faults --seed {seed}`; {machine()}.",
        "",
        f"{len(lost)} of {len(rows)} runs, with {kills} kills at random moments, ended in a state that differs from "
        "that of the uninterrupted run. Weights, optimizer, schedules, memory banks, best checkpoint and curves are "
        "compared bit by bit.",
        "",
        "| fault | run | count | processes | error message | differences |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = row.outcome.replace("|", "/") or "-"
        differs = ", ".join(row.differs[:3]) or "none"
        lines.append(f"| {row.what} | {row.settings} | {row.times} | {row.lives} | {said} | {differs} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Describe the versions and the machine."""
    return (
        f"lkd {lkd.__version__}, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores, 1 thread per process"
    )


def main() -> None:
    """Run the faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills at random moments, over all settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="settings whose name contains one of these words")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.seed)
        chosen = [name for name in RUNS if not given.only or any(word in name for word in given.only)]
        kills = 0
        while chosen and (kills < given.kills or len(rows) < len(chosen)):
            rows.append(bench.killed(chosen[len(rows) % len(chosen)]))
            kills += rows[-1].times
            print(rows[-1], flush=True)
        for make in [] if given.only else faults(bench):
            rows.append(make())
            print(rows[-1], flush=True)
    text = table(rows, given.seed)
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
