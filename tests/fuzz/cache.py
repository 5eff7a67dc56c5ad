"""Fuzz cached tensors (`lkd.io.tensor_cache.load_tensors` and `made_from`) and the list of unreadable images."""

from __future__ import annotations

import json
import random
import struct
import warnings
from pathlib import Path

import torch

from lkd.datamodules.unreadable import _kept
from lkd.io.tensor_cache import load_tensors, made_from, save_tensors
from tests.fuzz.mutate import mutate
from tests.fuzz.weights import _lying

REFUSALS = ()  # corrupt files are rebuilt and never end a run
MEMORY = 2**28
_FROM = {"teacher": "a", "seed": "0"}


class Fuzz:
    """Create and read cache files."""

    def __init__(self) -> None:
        self.tensors = {"logits": torch.arange(60.0).view(12, 5).half(), "classes": torch.arange(12).int()}
        self.content: bytes | None = None

    def make(self, rng: random.Random, folder: Path) -> Path:
        """Write one malicious file."""
        path, way = folder / "kept.safetensors", rng.random()
        if self.content is None:
            save_tensors(path, self.tensors, _FROM)
            self.content = path.read_bytes()
        if way < 0.05:
            path.write_bytes(self.content)
        elif way < 0.5:
            path.write_bytes(mutate(rng, self.content))
        elif way < 0.7:
            path.write_bytes(_lying(rng, self.content))
        elif way < 0.9:
            told = rng.choice(
                [
                    "[" * 100_000,
                    "{}",
                    "null",
                    "3",
                    '{"made_from": 3}',
                    '{"made_from": {"a": []}, "checksum": 0}',
                    "\ud800",
                ]
            )
            header = json.dumps(
                {"__metadata__": {"lkd": told}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
            )
            path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
        else:
            path = folder / "kept.json"
            rows = [{"position": rng.choice([0, 3, -1, 10**9, "x", None]), "reason": "r"} for _ in range(3)]
            path.write_bytes(
                mutate(rng, json.dumps(rng.choice([{"images": rows}, {"images": rows[:0]}, {}, 3, "[" * 99])).encode())
            )
        return path

    def read(self, path: Path) -> str:
        """Read the file; it must give the cached tensors, or be rebuilt."""
        if path.suffix == ".json":
            return "rebuilt" if _kept(path, 10) is None else "accepted"
        made_from(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = load_tensors(path, _FROM)
        if found is None:
            (warning,) = said
            if "\n" in str(warning.message):
                raise SystemError("a warning of several lines")
            return "rebuilt"
        if not all(torch.equal(found[name], self.tensors[name]) for name in self.tensors):
            raise SystemError("other numbers than were kept")
        return "accepted"
