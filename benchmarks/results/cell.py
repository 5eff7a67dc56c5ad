"""Train and evaluate one cell: `lkd fit`, then `lkd test` of its best and its last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextvars import copy_context
from multiprocessing import connection, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jsonargparse import ArgumentError
from safetensors.torch import save_file
from torch import nn

from benchmarks.results.plan import Cell
from benchmarks.results.store import TAUGHT, Record, Store, sha256
from lkd.checkpoints.find import newest_checkpoint, read_checkpoint
from lkd.cli.arguments import prepare
from lkd.cli.errors import explain
from lkd.cli.lightning_cli import LkdCLI
from lkd.cli.main import run
from lkd.io.tensor_cache import fingerprint, replacing
from lkd.io.yaml import load_yaml
from lkd.loading import ModuleLogits, network_of


def train(cell: Cell, store: Store, data: Path | None) -> None:
    """Train or continue a cell, evaluate it, and write its result. Must run in its own process.

    Args:
        cell: The cell.
        store: The store.
        data: Folder of the images; `None` uses that of the config.

    Raises:
        SystemExit: With the exit code of `lkd fit`, if it is not 0.
    """
    enter(store, store.run(cell.id) / "log.txt")
    _remember_teacher(cell, store)
    begun = _begin(store.run(cell.id))
    root = [] if data is None else [f"--data.init_args.root={data}"]
    if code := run(["fit", *arguments(cell, Path("runs") / cell.id), *root, "--resume"]):
        sys.exit(code)
    best, last = (newest_checkpoint(store.run(cell.id), name) for name in ("best", "last"))
    record = _described(cell, store, last.parents[1])
    record |= {"last": _figures(last, root), "best": _figures(best, root, store.weights(cell.id))}
    record |= {"seconds": time.time() - begun}
    store.save("results", cell.id, record)
    shutil.rmtree(last.parent)


def _remember_teacher(cell: Cell, store: Store) -> None:
    """Record which teacher a run learns from; a run that was begun with other weights starts again."""
    taught, run = _teacher(cell, store), store.run(cell.id)
    if taught is None:
        return
    file = run / TAUGHT
    if file.is_file() and json.loads(file.read_text()) != taught:
        for version in run.glob("version_*"):
            shutil.rmtree(version)
        (run / "begun.json").unlink(missing_ok=True)
    with replacing(file) as path:
        path.write_text(json.dumps(taught))


def _teacher(cell: Cell, store: Store) -> Record | None:
    taught = store.result(cell.teacher) if cell.teacher else None
    return {"id": cell.teacher, "weights": taught["best"]["weights"]} if taught else None


def enter(store: Store, log: Path) -> None:
    """Set up a forked process: working directory, log and signals. It stops when its parent ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(store.folder)  # paths in configs are relative to the store, so that it can be moved
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    threading.Thread(target=_follow_parent, daemon=True).start()


def check(cell: Cell) -> None:
    """Parse the settings of a cell.

    Raises:
        ValueError: If a setting is unknown or its value is invalid.
    """
    try:
        with TemporaryDirectory() as folder:
            copy_context().run(LkdCLI, *prepare(["fit", *arguments(cell, Path(folder))])[:2], until="parsed")
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{cell.method} of {cell.pair}: {explain(error)}") from error


def arguments(cell: Cell, folder: Path) -> list[str]:
    """Write the configs of a cell to a folder and return the arguments of `lkd fit`."""
    for number, config in enumerate(cell.configs):
        with replacing(folder / f"{number}.yaml") as path:
            path.write_text(yaml.safe_dump(config, sort_keys=False))
    files = [f"--config={folder}/{number}.yaml" for number in range(len(cell.configs))]
    return [*files, f"--name={cell.id}", "--trainer.default_root_dir=runs", "--trainer.enable_progress_bar=false"]


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # lkd writes a checkpoint


def _begin(folder: Path) -> float:
    """Return the start time the training would have had without interruptions; lost work is not counted."""
    file, now, last = folder / "begun.json", time.time(), 0.0
    if file.is_file():
        times = [path.stat().st_mtime for path in folder.glob("version_*/checkpoints/last.ckpt")]
        last = max(0.0, max(times, default=0.0) - json.loads(file.read_text()))
    with replacing(file) as path:
        path.write_text(json.dumps(now - last))
    return now - last


def _figures(checkpoint: Path, root: list[str], keep: Path | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Args:
        checkpoint: The checkpoint.
        root: Argument that names the folder of the images.
        keep: File for the network's weights in float16; `None` does not write them.

    Returns:
        The number of epochs, the main metric on validation and test images in percent, that of each class on the test
        images (if the task reports it), a hash of the weights, and that of the file.
    """
    content = read_checkpoint(checkpoint)
    states = content["callbacks"].items()
    validated = next(state["metrics"] for name, state in states if name.startswith("LastCheckpoint"))
    cli = copy_context().run(LkdCLI, *prepare(["test", f"--ckpt_path={checkpoint}", *root])[:2])
    state, task, tested = content["state_dict"], cli.model.task, cli.trainer.callback_metrics
    figures = {
        "epoch": content["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"],
        "metric": task.metric_title,
        "val": 100 * float(validated[f"val/{task.metric}"]),
        "test": 100 * float(tested[f"test/{task.metric}"]),
        "hash": fingerprint(*(part for name in sorted(state) for part in (name, state[name]))),
    }
    if classes := {name.split("/", 2)[2]: 100 * float(value) for name, value in tested.items() if name.count("/") > 1}:
        figures |= {"classes": classes}
    return figures if keep is None else figures | {"weights": _keep_weights(network_of(cli.model), keep)}


def _described(cell: Cell, store: Store, folder: Path) -> Record:
    """Return the metadata of a result: the cell, and the versions, devices and images of its run."""
    lives = load_yaml((folder / "run.yaml").read_text())
    config = load_yaml((folder / "config.yaml").read_text())
    return {
        **{"id": cell.id, "label": cell.label, "pair": cell.pair, "recipe": cell.recipe, "method": cell.method},
        **{"seed": cell.seed, "network": cell.network, "configs": cell.configs},
        "teacher": _teacher(cell, store),
        "precision": config["trainer"]["precision"],
        **{name: lives[-1][name] for name in ("versions", "images")},
        "revision": lives[-1]["revisions"].get("lkd"),
        "devices": _distinct(life["devices"] for life in lives),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    found.extend(value for value in values if value not in found)
    return found


def _keep_weights(network: nn.Module, target: Path) -> str | None:
    """Write a network's weights in float16.

    Returns:
        The hash of the file; `None` if the network cannot predict on its own, in which case nothing is written.
    """
    if isinstance(network, ModuleLogits):
        return None
    state = {name: part.half() if part.is_floating_point() else part for name, part in network.state_dict().items()}
    with replacing(target) as path:
        save_file({name: part.contiguous() for name, part in state.items()}, path)
    return sha256(target)
