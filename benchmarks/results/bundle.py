"""Bundles: everything that another machine needs to continue a store, in files of limited size."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.results.plan import TEACHER
from benchmarks.results.store import Store, sha256

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_MANIFEST = "manifest.json"
_RUN = ("*.json", "version_*/*.yaml", "version_*/checkpoints/last.ckpt", "version_*/checkpoints/best.ckpt")
"""Files of an unfinished cell; curves are omitted."""


def size(text: str) -> int:
    """Parse a number of bytes.

    Example:
        >>> size("15M")
        15728640
    """
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not found or not int(found[1]):
        raise ValueError(f"a size must be a number with an optional unit K, M or G, such as 15M, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def pack(store: Store, file: Path, part_size: int) -> list[Path]:
    """Write results, tuned settings, unfinished cells and the weights of teachers to a tar archive in parts.

    Args:
        store: The store.
        file: The archive; parts are named `FILE.1-of-3` and so on.
        part_size: Largest size of a part, in bytes.

    Returns:
        The parts. Those of an earlier bundle of the same name are removed.

    Raises:
        ValueError: If the store is empty.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent) as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            hashes = {}
            for path in _contents(store):
                name, content = str(path.relative_to(store.folder)), path.read_bytes()
                hashes[name] = hashlib.sha256(content).hexdigest()
                _add(archive, name, content)
            if not hashes:
                raise ValueError(f"{store.folder} contains nothing to bundle")
            # the last file, so that an incomplete bundle lacks it
            _add(archive, _MANIFEST, json.dumps(hashes).encode())
        for old in _parts(file):
            old.unlink()
        number = -(-stream.tell() // part_size)
        stream.seek(0)
        parts = [file.with_name(f"{file.name}.{part}-of-{number}") for part in range(1, number + 1)]
        for part in parts:
            part.write_bytes(stream.read(part_size))
    return parts


@contextmanager
def opened(place: Path) -> Iterator[Store]:
    """Open a store from a folder, or from a bundle, which is unpacked to a temporary folder.

    Args:
        place: The folder, or the name of the bundle without the suffix of a part.

    Raises:
        FileNotFoundError: If there is neither, or a part is missing.
        ValueError: If a folder is not a store, or a bundle is damaged or consists of parts of different bundles.
    """
    if place.is_dir():
        if not any((place / kind).is_dir() for kind in ("results", "runs", "tuned")):
            raise ValueError(f"{place} is not a store, because it contains neither results nor runs")
        yield Store(place)
        return
    parts = _parts(place)
    number = int(parts[0].name.rpartition("-")[2]) if parts else 0
    wanted = [f"{place.name}.{part}-of-{number}" for part in range(1, number + 1)]
    missing = sorted({*wanted} ^ {part.name for part in parts})
    if not parts or missing:
        reason = f"the parts differ from those of one bundle in {', '.join(missing)}" if parts else "not found"
        raise FileNotFoundError(f"{place} is neither a folder nor a complete bundle: {reason}")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stream:
        for name in wanted:
            stream.write(place.with_name(name).read_bytes())
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream) as archive:
                archive.extractall(folder, filter="data")
            hashes = json.loads((Path(folder) / _MANIFEST).read_text())
            is_whole = all(sha256(Path(folder) / name) == wanted for name, wanted in hashes.items())
        except (tarfile.TarError, OSError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{place} is damaged, or its parts belong to different bundles; create it again")
        yield Store(Path(folder))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _parts(file: Path) -> list[Path]:
    return [path for path in file.parent.glob(f"{file.name}.*") if re.fullmatch(r"\.\d+-of-\d+", path.suffix)]


def _contents(store: Store) -> Iterator[Path]:
    records = store.results()
    finished = {record["id"] for record in records}
    yield from sorted(path for kind in ("results", "tuned") for path in (store.folder / kind).glob("*.json"))
    yield from (store.weights(record["id"]) for record in records if record["method"] == TEACHER)
    for run in sorted((store.folder / "runs").glob("*")):
        if run.name not in finished:
            yield from sorted(path for pattern in _RUN for path in run.glob(pattern))
