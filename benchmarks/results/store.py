"""Stores: folders with the results of finished cells and the state of unfinished ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results.plan import Cell, weights_file
from lkd.checkpoints.find import read_checkpoint
from lkd.io.tensor_cache import replacing

Record = dict[str, Any]

TAUGHT = "teacher.json"
"""File in the folder of a run that identifies the teacher's weights."""


class Store:
    """Folder of results.

    - `results/CELL.json`: a finished cell. It is written last, and atomically.
    - `weights/CELL.safetensors`: the weights of a finished cell's best checkpoint, in float16. Teachers are loaded from
      this file, so that students on all machines learn from the same weights.
    - `tuned/CELL.json`: settings found by `--tune` for a cell.
    - `runs/CELL/`: the run of `lkd fit`; its checkpoints are removed when the cell is finished.
    - `locks/CELL`: locked while a process trains the cell.

    Args:
        folder: The folder; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def result(self, cell: str) -> Record | None:
        """Return the result of a cell; `None` if it is not finished."""
        return _read(self.folder / "results" / f"{cell}.json")

    def finished(self, cell: Cell) -> Record | None:
        """Return the result of a cell; `None` if it is not finished or its teacher has been replaced since."""
        record = self.result(cell.id)
        return record if record is not None and self.is_current(record) else None

    def is_current(self, record: Record) -> bool:
        """Return whether a result is that of a student of this store's teacher, or of a network without a teacher."""
        if not record["teacher"]:
            return True
        teacher = self.result(record["teacher"]["id"])
        return teacher is not None and teacher["best"]["weights"] == record["teacher"]["weights"]

    def results(self) -> list[Record]:
        """Return all results."""
        return _all(self.folder / "results")

    def tuned(self) -> dict[str, dict[str, Any]]:
        """Return the settings found by `--tune`, with dotted names, by cell."""
        return {record["cell"]: record["settings"] for record in _all(self.folder / "tuned")}

    def save(self, kind: str, cell: str, record: Mapping[str, Any]) -> None:
        """Write a JSON file atomically.

        Args:
            kind: `results` or `tuned`.
            cell: The cell's ID.
            record: The content.
        """
        with replacing(self.folder / kind / f"{cell}.json") as path:
            path.write_text(json.dumps(record, indent=1) + "\n")

    def weights(self, cell: str) -> Path:
        """Return the path of a finished cell's weights."""
        return self.folder / weights_file(cell)

    def run(self, cell: str) -> Path:
        """Return the folder of a cell's runs."""
        return self.folder / "runs" / cell

    def is_ready(self, cell: Cell) -> bool:
        """Return whether a cell's teacher is trained."""
        return not cell.teacher or (self.result(cell.teacher) is not None and self.weights(cell.teacher).is_file())

    @contextmanager
    def claimed(self, cell: str) -> Iterator[bool]:
        """Lock a cell for this process and the processes that it forks.

        Yields:
            Whether the lock was acquired; otherwise, another process holds it.
        """
        path = self.folder / "locks" / cell
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # shared with forked processes until all have ended
            except BlockingIOError:
                yield False
            else:
                yield True

    def merge(self, other: Store) -> Iterator[str]:
        """Import finished cells, tuned settings, and unfinished cells that were trained for longer than in this store.

        A cell that is finished in both stores is not changed. A cell whose teacher's weights differ from those
        in this store is skipped, because its results would not be comparable.

        Args:
            other: The other store.

        Yields:
            A line for each cell that is imported, differs, or is skipped.
        """
        for record in sorted(other.results(), key=lambda record: record["teacher"] is not None):
            yield from self._take(other, record)
        for path in sorted((other.folder / "tuned").glob("*.json")):
            if not (self.folder / "tuned" / path.name).exists():
                _copy(path, self.folder / "tuned" / path.name)
                yield f"{path.stem}: tuned settings imported"
        for run in sorted((other.folder / "runs").glob("*")):
            if self.result(run.name) is None and steps(run) > steps(self.run(run.name)):
                taught = _read(run / TAUGHT)
                known = self.result(taught["id"]) if taught else None
                if taught and known is not None and known["best"]["weights"] != taught["weights"]:
                    yield f"{run.name}: skipped, because its teacher's weights differ from those in this store"
                    continue
                with self.claimed(run.name) as is_free:
                    if is_free:
                        self._take_run(run)
                        yield f"{run.name}: continues after {steps(run):,} steps"
                    else:
                        yield f"{run.name}: skipped, because it is being trained here"

    def _take_run(self, run: Path) -> None:
        """Copy an unfinished cell; an incomplete copy never replaces that of this store."""
        copied = self.folder / "incoming" / run.name
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run, copied, ignore=shutil.ignore_patterns("sweep"))
        if (self.run(run.name) / "sweep").is_dir():
            (self.run(run.name) / "sweep").rename(copied / "sweep")
        shutil.rmtree(self.run(run.name), ignore_errors=True)
        self.run(run.name).parent.mkdir(exist_ok=True)
        copied.rename(self.run(run.name))

    def _take(self, other: Store, record: Record) -> Iterator[str]:
        cell, teacher = record["id"], record["teacher"]
        own = self.result(cell)
        if own is not None and self.is_current(own):
            if own["best"] != record["best"] or own["last"] != record["last"]:
                yield f"{cell}: not changed, although the results in the other store differ"
            return
        known = self.result(teacher["id"]) if teacher else None
        if known is not None and known["best"]["weights"] != teacher["weights"]:
            yield f"{cell}: skipped, because its teacher's weights differ from those in this store"
            return
        weights = other.weights(cell)
        if weights.is_file() and sha256(weights) != record["best"]["weights"]:
            yield f"{cell}: skipped, because its weights are not those of its result"
            return
        with self.claimed(cell) as is_free:
            if is_free:
                if weights.is_file():
                    _copy(weights, self.weights(cell))
                self.save("results", cell, record)
        yield f"{cell}: {'imported' if is_free else 'skipped, because it is being trained here'}"


def steps(run: Path) -> int:
    """Return the optimizer step from which a cell resumes; 0 without a checkpoint."""
    paths = sorted(run.glob("version_*/checkpoints/last.ckpt"))
    return max(map(_step, paths), default=0)


def _step(checkpoint: Path) -> int:
    try:
        return int(read_checkpoint(checkpoint)["global_step"])
    except ValueError:  # damaged
        return 0


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file as a hexadecimal string."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> Record | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged; delete it, so that its cell is trained again ({error})") from error


def _all(folder: Path) -> list[Record]:
    return [record for path in sorted(folder.glob("*.json")) if (record := _read(path)) is not None]


def _copy(path: Path, target: Path) -> None:
    with replacing(target) as written:
        shutil.copyfile(path, written)
